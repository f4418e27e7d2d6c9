import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # threads that wait for each other's cores are slow
    os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parents[1]
TASKS = ["tldr", "arxiv", "coding", "strbuild", "housebuild"]  # the embedded ones
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402

import sandbox  # noqa: E402

transformers.utils.logging.disable_progress_bar()

# Zygotes bear a mark, so that a test tells those of its own process from another worker's
ZYGOTE_MARK = f"# of the test process {os.getpid()}\n"
far_side_source = sandbox.far_side_source
sandbox.far_side_source = lambda caged: far_side_source(caged) + ZYGOTE_MARK


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)  # the default --model is a relative path


@pytest.fixture(scope="session", autouse=True)
def little_disk(tmp_path_factory):
    """A suite that leaves its runs behind has filled a disk, and then fails anywhere."""
    yield
    assert sum(path.lstat().st_size for path in tmp_path_factory.getbasetemp().rglob("*")) < 2**30


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty current folder with the default model in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").symlink_to(ROOT / "models")
    return tmp_path


@pytest.fixture(scope="session")
def other_model(tmp_path_factory):
    """A local model of another architecture, shape and tokenizer: GPT-2, no chat template, pad
    equal to eos."""
    folder = tmp_path_factory.mktemp("other") / "gpt2"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    options = {"special_tokens": ["<eos>"], "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    trainer = trainers.BpeTrainer(vocab_size=300, **options)
    tokenizer.train_from_iterator(["def aux(x):\n    return x * 2\n"] * 4, trainer)
    marks = {"eos_token": "<eos>", "pad_token": "<eos>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"n_embd": 48, "n_layer": 3, "n_head": 3, "n_positions": 4096}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(vocab_size=len(tokenizer), **shape, **ends)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return str(folder)
