"""What can not be loaded ends with one line that has its cause, and exit code 2."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import collm_cc


@pytest.fixture
def broken(tmp_path):
    """A copy of models/tiny to break."""
    return shutil.copytree("models/tiny", tmp_path / "broken")


def edit_json(path, **changes):
    """Set fields of a JSON file; None takes one away."""
    data = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: x for name, x in data.items() if x is not None}))


def edit_weights(folder, edit):
    """Replace the weights of a folder by `edit` of them."""
    path = folder / "model.safetensors"
    weights = edit(load_file(path))
    save_file(weights, path, {"format": "pt"})


def truncate(folder, share=0.5):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def remove(folder, *patterns):
    for pattern in patterns:
        for path in folder.glob(pattern):
            path.unlink()


def without(weights, part):
    return {name: x for name, x in weights.items() if part not in name}


def with_nan(weights):
    weights["model.layers.2.mlp.up_proj.weight"][3, 4] = torch.nan
    return weights


def no_eos(folder):
    remove(folder, "generation_config.json", "chat_template.jinja")
    edit_json(folder / "config.json", eos_token_id=None)
    edit_json(folder / "tokenizer_config.json", eos_token=None)


# name: (how to break a folder, what the line says)
FAULTS = {
    "truncated weights": (truncate, "Safetensor"),
    "empty weights": (lambda x: truncate(x, 0), "Safetensor"),
    "other shapes": (
        lambda x: edit_json(x / "config.json", intermediate_size=512),
        r"its files lack weights of its config: model\.layers\.0\.",
    ),
    "more layers than weights": (
        lambda x: edit_json(x / "config.json", num_hidden_layers=6),
        r"its files lack weights of its config: model\.layers\.4\.",
    ),
    "a missing layer": (
        lambda x: edit_weights(x, lambda weights: without(weights, "layers.1.")),
        r"its files lack weights of its config: model\.layers\.1\.",
    ),
    "no weights": (lambda x: remove(x, "*.safetensors"), "OSError: .*safetensors"),
    "no tokenizer": (lambda x: remove(x, "*token*"), "tokenizer"),
    "broken tokenizer": (
        lambda x: (x / "tokenizer.json").write_text("{"),
        "JSONDecodeError",
    ),
    "unknown type": (
        lambda x: edit_json(x / "config.json", model_type="llamo"),
        "llamo",
    ),
    "no type": (
        lambda x: edit_json(x / "config.json", model_type=None),
        "model_type",
    ),
    "broken config": (
        lambda x: (x / "config.json").write_text('{"model_type": '),
        "not a valid JSON",
    ),
    "a config of a wrong type": (
        lambda x: edit_json(x / "config.json", hidden_size="wide"),
        "hidden_size",
    ),
    "custom code": (
        lambda x: edit_json(
            x / "config.json",
            model_type="mine",
            auto_map={"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"},
        ),
        "custom code",
    ),
    "an empty folder": (lambda x: remove(x, "*"), "config"),
    "another kind of model": (
        lambda x: edit_json(x / "config.json", model_type="t5"),
        "T5Config",
    ),
    "weights that are not finite": (
        lambda x: edit_weights(x, with_nan),
        r"agent 0 \(.*broken\): .*not finite",
    ),
    "no token that ends a response": (no_eos, "no token ends a response"),
}


def one_line(script, monkeypatch, capfd, *flags) -> str:
    """The line on stderr of a command that exits with code 2."""
    monkeypatch.setattr(script, "open_run", lambda *args: pytest.fail("a run began"))
    argv = [script.__file__, "--run-name", "never", "--task", "coding", *flags]
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(SystemExit) as caught:
        script.command_line(script.Args, script.main)
    out, err = capfd.readouterr()
    assert caught.value.code == 2
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert err.startswith("error: ")
    return err


@pytest.mark.parametrize("fault", FAULTS)
def test_a_model_that_can_not_be_used(fault, broken, monkeypatch, capfd):
    break_it, message = FAULTS[fault]
    break_it(broken)
    line = one_line(collm_cc, monkeypatch, capfd, "--model", str(broken))
    assert str(broken) in line
    assert len(line) < 800
    assert re.search(message, line), line


def test_a_name_that_is_nowhere(monkeypatch, capfd, tmp_path):
    line = one_line(collm_cc, monkeypatch, capfd, "--model", "nobody/knows-this")
    assert line.startswith("error: --model nobody/knows-this: OSError: ")
    (tmp_path / "file").write_text("not a folder")
    line = one_line(collm_cc, monkeypatch, capfd, "--model", str(tmp_path / "file"))
    assert line.startswith(f"error: --model {tmp_path}/file: ")


def test_a_command_prints_its_one_line_alone(broken):
    """In a process of its own, where transformers would print a table of what is missing."""
    edit_json(broken / "config.json", num_hidden_layers=6)
    command = [sys.executable, collm_cc.__file__, "--model", str(broken)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: --model ")


def test_a_critic_whose_weights_are_not_finite(broken, monkeypatch, capfd):
    edit_weights(broken, with_nan)
    line = one_line(collm_cc, monkeypatch, capfd, "--critic-model", str(broken))
    assert "critic of agents [0, 1]" in line
    assert "not finite" in line


def test_the_second_agent_is_named(broken, monkeypatch, capfd):
    edit_weights(broken, with_nan)
    line = one_line(collm_cc, monkeypatch, capfd, "--model", "models/tiny", str(broken))
    assert "agent 1 (" in line
