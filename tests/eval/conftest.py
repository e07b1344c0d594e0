"""A mirror of three rows and a tiny checkpoint."""

from functools import lru_cache

import lm_eval.utils
import pytest
from tiny_eval import CONFIGS, ITEMS, byte_tokenizer, tiny_llama, write_data_set


@pytest.fixture(scope="session", autouse=True)
def compiled_templates():
    """Compiles each template once; lm-eval compiles it anew for every item and field, which takes most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_eval.utils.env, "from_string", lru_cache(lm_eval.utils.env.from_string))
        yield


@pytest.fixture(scope="session")
def mirror_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("mirror")
    for repository, (config, splits) in CONFIGS.items():
        starts = range(0, 1000, 100)
        write_data_set(
            root,
            repository,
            config,
            {
                split: [ITEMS[repository](start + number) for number in range(5 if split == "test" else 30)]
                for split, start in zip(splits, starts, strict=False)
            },
        )
    return root


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A folder that transformers loads."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_llama().save_pretrained(folder)
    byte_tokenizer(eos_token="<end>").save_pretrained(folder)
    return folder
