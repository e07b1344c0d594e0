"""Reads what a model has learned to mix, cell by cell.

    python examples/read_depth_weights.py qwen3-attnres notes.txt [FIGURE.png]

In an editor that knows `# %%` (VS Code, Spyder, Jupyter with jupytext) run it a cell at a time, with your own paths in
the first one.
"""

# %% A model, its tokenizer and a text
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import attnres  # noqa: F401  registers the model with the Auto classes

arguments = ["qwen3-attnres", "notes.txt"] if "ipykernel" in sys.modules else sys.argv[1:]
if len(arguments) not in (2, 3):
    raise SystemExit(__doc__)
MODEL, TEXT, FIGURE = [*arguments, "depth-weights.png"][:3]

tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL).eval()
text = Path(TEXT).read_text(encoding="utf-8")
print(f"{MODEL}: {model.config.num_hidden_layers} decoder layers, residual_mode {model.config.residual_mode}")

# %% The weights of one passage: 2 L + 1 tensors [B, T, n], attention, MLP, attention, MLP, ..., output
inputs = tokenizer(text[:1000], return_tensors="pt")
with torch.no_grad():
    weights = model(**inputs, output_depth_weights=True).depth_weights
for name, each in (("first MLP", weights[1]), ("last MLP", weights[-2]), ("output", weights[-1])):
    shares = " ".join(f"{share:.2f}" for share in each.mean((0, 1)))
    print(f"{name:>10}: {each.shape[-1]} sources, mean weights {shares}")
assert all(torch.allclose(each.sum(-1), torch.ones(())) for each in weights)

# %% Which tokens take most from the embedding where the output is mixed
from_embedding = weights[-1][0, :, 0]
most = from_embedding.topk(min(5, len(from_embedding)))
for share, position in zip(most.values.tolist(), most.indices.tolist(), strict=True):
    print(f"{share:.3f} {tokenizer.decode(inputs['input_ids'][0, position])!r}")

# %% Over the whole text, however long: means, spreads, entropies
from attnres.analysis import depth_weights  # noqa: E402

found = depth_weights(model, tokenizer, text, max_tokens=20_000, name=MODEL)
print(f"{found.num_tokens} tokens, sources: {', '.join(found.sources)}")
for mixture in found.mixtures:
    print(
        f"{mixture.name:>20}: newest source {mixture.newest:.2f}, embedding {mixture.embedding:.2f}, "
        f"as many as {mixture.effective_sources:.2f} of {mixture.num_sources} sources with equal weights"
    )

# %% Attention against MLP: in the paper the mixtures before an MLP are sharper
for kind, means in found.summary()["overall"].items():
    print(
        f"{kind:>10}: newest source {means['newest']:.2f}, embedding {means['embedding']:.2f}, "
        f"as many as {means['effective_sources']:.2f} sources"
    )

# %% A picture (pip install 'attention-residuals[hub]')
from attnres import plots  # noqa: E402
from attnres.analysis.inspection import panels  # noqa: E402

plots.depth_panels(FIGURE, [panels(found)])
print(f"wrote {FIGURE}")
