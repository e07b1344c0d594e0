"""llama.cpp's own converter on a folder without a tokenizer: python gguf_without_vocabulary.py LLAMA_CPP MODEL GGUF."""

import runpy
import sys

llama_cpp, model, result = sys.argv[1:]
sys.path[:0] = [llama_cpp, f"{llama_cpp}/gguf-py"]

from conversion.kimi_k3 import KimiK3Model  # noqa: E402

KimiK3Model.set_vocab = lambda self: self._set_vocab_none()
sys.argv = ["convert_hf_to_gguf.py", model, "--outfile", result, "--outtype", "f32"]
runpy.run_path(f"{llama_cpp}/convert_hf_to_gguf.py", run_name="__main__")
