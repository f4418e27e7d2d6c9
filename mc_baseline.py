# docs: README.md#how-to-read
"""MAGRPO and its siblings: multi-agent Monte Carlo policy gradient (baselines of 2601.21972).

Agent i answers its own history h_it with a whole text a_it; all agents get one reward r_t. There is
no critic: the advantage is the return-to-go less a baseline over K episodes of the same item.
Execution needs the agents alone.

What differs from the paper, and why: an episode is one token sequence per agent that only grows,
so that one forward and one KV cache serve all turns; actions are sampled from the very
distribution that is trained (no top-p); an agent takes one gradient step per minibatch of episodes.

CPU:      python SCRIPT.py --task coding --seed 1
one GPU:  python SCRIPT.py --model Qwen/Qwen2.5-Coder-0.5B-Instruct --actor-lr 5e-6 --dtype bfloat16
GPUs:     torchrun --nproc-per-node=8 SCRIPT.py with the same flags: ranks share the episodes
"""
# Shapes: B episodes (of an update: of a minibatch), N agents, T turns, S tokens of a sequence,
# R tokens of a response, V vocabulary, D width, b episodes of a microbatch, p rows that a forward
# reads, k rows that still decode, n tokens of responses.

import contextlib
import copy
import json
import logging
import os
import resource
import shutil
import signal
import sys
import time
import traceback
import zipfile
from dataclasses import asdict, dataclass, field
from importlib import import_module
from math import comb, inf
from pathlib import Path
from typing import Literal

# Threads of GNU OpenMP that wait for each other spin this often, then sleep. Without a limit, two
# runs that share cores take turns spinning; torch reads it when it is imported (docs/speed.md).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import numpy as np
import torch
import tyro
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Cache,
    DynamicCache,
    DynamicLayer,
    GenerationConfig,
)
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.utils import logging as transformers_logging

from envs import UserError, make, score_batch


# ============================================= Args =============================================
@dataclass
class Args:
    exp_name: str = Path(__file__).stem
    """name of the experiment"""
    seed: int = 1
    """seed of all that is random: initialisation, order of items, sampling"""
    task: str = "coding"
    """tldr, arxiv, coding, strbuild or housebuild; with options: strbuild:private,feedback=score"""
    dataset: str | None = None
    """items instead of the embedded ones: a file, `humaneval` (coding), or a Hub id, NAME:SPLIT"""
    eval_dataset: str | None = None
    """held-out items, as --dataset; by default every fifth row of it"""
    model: list[str] = field(default_factory=lambda: ["models/tiny"])
    """Hub id or folder of a causal LM: one for all agents, or one for each"""
    num_agents: int = 2
    """agents in the team (N); 1 is the single-agent special case"""
    num_turns: int | None = None
    """turns of an episode (T); the task's own by default"""
    success: float | None = None
    """raw reward at which an episode ends early; the task's own by default"""
    reward_shift: float | None = None
    """added to every raw reward; the task's own by default"""
    total_env_steps: int | None = None
    """joint actions to train for, the last iteration to its end; the task's own by default"""
    num_envs: int | None = None
    """episodes of an iteration (B); the task's own by default"""
    num_minibatches: int = 1
    """gradient steps of an agent in an iteration, each on num_envs / num_minibatches episodes"""
    microbatch_tokens: int = 2048
    """tokens, padding included, of a forward of the update: bounds memory, changes only rounding"""
    max_new_tokens: int | None = None
    """longest response (R); the task's own by default"""
    temperature: list[float] = field(default_factory=lambda: [1.0])
    """of sampling and of the log-probabilities that are trained: one for all agents or one each"""
    gamma: float = 0.9
    """discount from one turn to the next"""
    num_generations: int = 4
    """episodes of each item in an iteration (K)"""
    baseline: Literal["mean", "rloo", "max", "none"] = "mean"
    """of K returns: mean (MAGRPO), rloo (mean of the others), max (ReMax-like), none (REINFORCE)"""
    actor_lr: list[float] = field(default_factory=lambda: [3e-4])
    """learning rate: one for all agents or one each; 0 freezes an agent"""
    norm_adv: bool = True
    """normalise advantages of each agent over the turns that a minibatch played (its live turns)"""
    max_grad_norm: float = 1.0
    """largest gradient norm of each model"""
    kl_coef: float = 0.0
    """coefficient of KL(pi || reference); the reference is the model that training starts from"""
    eval_every: int = 10
    """iterations between evaluations on held-out items; 0: only at the start and the end"""
    eval_episodes: int = 128
    """most episodes of an evaluation, 64 at once or more: four of each of the first items"""
    save_every: int = 25
    """iterations between checkpoints; 0: only at the start and the end"""
    resume: str | None = None
    """run folder to go on with, e.g. runs/NAME"""
    run_name: str | None = None
    """name of the folder in runs/; {task}__{exp_name}__{seed}__{unix time} by default"""
    track: bool = False
    """also log to Weights & Biases"""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto is cuda if there is one"""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """arithmetic of the models; bfloat16 is autocast over float32 weights"""
    lora_rank: int = 0
    """rank of LoRA adapters (peft) over frozen weights; 0: train all weights"""
    gradient_checkpointing: bool = False
    """keep only the inputs of layers for the backward pass: saves memory, costs one more forward"""


@contextlib.contextmanager
def naming(what: str):
    """UserError, in one line that says what it was about, for whatever is raised within."""
    try:
        yield
    except Exception as error:  # each library has its own
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        text = " ".join(str(error).split())
        raise UserError(f"{what}: {kind}{text}"[:500]) from error


def parse_args(args_class, argv: list[str] | None = None):
    """Checked args of a command line. With --resume, the run's own args are the defaults."""
    args = tyro.cli(args_class, args=argv)
    if args.resume:
        with naming(f"--resume {args.resume}"):
            saved = json.loads(Path(args.resume, "args.json").read_text())
            saved = args_class(**{**saved, "resume": args.resume})
        args = tyro.cli(args_class, args=argv, default=saved)
    check_args(args)
    return args


def check_args(args) -> None:
    """UserError for a number that can not work, whatever the task and the models are."""
    may_be_0 = ["seed", "eval_every", "save_every", "lora_rank", "gamma", "gae_lambda"]
    may_be_0 += ["kl_coef", "vf_coef", "actor_lr"]
    for name, given in asdict(args).items():
        flag = f"--{name.replace('_', '-')} {given}: must be"
        values = given if isinstance(given, list) else [given]
        if len(values) not in (1, args.num_agents):
            raise UserError(f"{flag} one for all agents, or {args.num_agents}, one for each")
        for value in values:
            if type(value) not in (int, float) or name in ("success", "reward_shift"):
                continue
            if name in may_be_0 and not value >= 0:
                raise UserError(f"{flag} at least 0")
            if name not in may_be_0 and not value > 0:
                raise UserError(f"{flag} above 0")
            if name in ("gamma", "gae_lambda") and value > 1:
                raise UserError(f"{flag} at most 1")


# ======================================== seeds and ranks ========================================
def rng(seed: int, purpose: str, *numbers: int) -> np.random.Generator:
    """The random stream of one purpose: no two (seed < 2**32, purpose, numbers) share one."""
    purposes = ["initialisation", "items", "minibatches", "rollout", "evaluation", "check"]
    return np.random.default_rng([seed, purposes.index(purpose), *numbers])


def draw_items(items: list[dict], n: int, seed: int, iteration: int) -> list[dict]:
    """Batch number `iteration` of an endless stream that shuffles the items anew each epoch."""
    batch = []
    while len(batch) < n:
        epoch, start = divmod(iteration * n + len(batch), len(items))
        order = rng(seed, "items", epoch).permutation(len(items))
        batch += [items[k] for k in order[start : start + n - len(batch)]]
    return batch


def rank() -> int:
    """Number of this process among those that torchrun started; 0 if it is alone."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Number of processes that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def join_ranks(name: str) -> torch.device:
    """The device that --device names, for `auto` and `cuda` this rank's own; joins other ranks."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    with naming(f"--device {name}"):
        device = torch.empty(0, device=name).device
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cuda.enable_cudnn_sdp(False)  # plans each shape, has given NaN gradients
    if world_size() > 1:
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def all_sum(*tensors: torch.Tensor) -> torch.Tensor:
    """Sum tensors of one type over the ranks, in place, by one all-reduce; gives the first."""
    if world_size() > 1:
        flat = torch.cat([x.flatten() for x in tensors])
        torch.distributed.all_reduce(flat)
        parts = flat.split([x.numel() for x in tensors])
        for x, part in zip(tensors, parts, strict=True):
            x.copy_(part.view_as(x))
    return tensors[0]


def gather(items: list) -> list:
    """The lists of all ranks as one list, on every rank."""
    if world_size() == 1:
        return items
    lists = [None] * world_size()
    torch.distributed.all_gather_object(lists, items)
    return [item for part in lists for item in part]


def say(text: str) -> None:
    """Print one line to stderr, above a progress bar if there is one, on the first rank."""
    if rank() == 0:
        tqdm.write(" ".join(text.split()), file=sys.stderr)


# ============================================ models ============================================
def load_model(auto_class, name: str, args: Args, device: torch.device, frozen: dict):
    """(model, tokenizer) of a Hub id or folder; `frozen`: weights that LoRA models share."""
    dtype = torch.float64 if args.dtype == "float64" else torch.float32
    options = {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
    options["trust_remote_code"] = False
    if dtype == torch.float64:  # for which torch has no grouped product
        options["experts_implementation"] = "eager"
    flag = "--model" if auto_class is AutoModelForCausalLM else "--critic-model"
    with naming(f"{flag} {name}"):
        base = name
        adapter = Path(name, "adapter")  # as Agent.export writes it
        if args.lora_rank and adapter.exists():
            saved = json.loads((adapter / "adapter_config.json").read_text())
            base = saved["base_model_name_or_path"]
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
        model, loading = auto_class.from_pretrained(base, config=config, **options)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        wrong = [*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])]
        if wrong:  # they would start at random
            raise UserError(f"its files lack weights of its config: {min(wrong)}, ...")
        remove_dropout(model)
        if args.gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        if args.lora_rank:
            freeze(model, args)
            model = add_lora(model.to(device), base, adapter, args.lora_rank, frozen)
    model = model.to(device).eval()
    if args.dtype == "bfloat16":
        autocast(model, device)
    return model, tokenizer


def autocast(model: nn.Module, device: torch.device) -> None:
    """Compute in bfloat16, but for the head: bfloat16 knows a logit of 20 to a tenth."""
    model.forward = torch.autocast(device.type, torch.bfloat16)(model.forward)
    head = model.get_output_embeddings()
    if head:
        head.register_forward_pre_hook(lambda _, inputs: inputs[0].float())
        head.forward = torch.autocast(device.type, enabled=False)(head.forward)


def remove_dropout(model: nn.Module) -> None:
    """Set to 0 the dropout of layers' own, which --gradient-checkpointing would switch on."""
    for module in model.modules():
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def add_lora(model: nn.Module, name: str, adapter: Path, lora_rank: int, frozen: dict):
    """Add LoRA adapters (2106.09685, alpha = 2 rank) to the linear layers of a frozen model."""
    with naming("pip install peft"):
        peft = import_module("peft")
    # Models of one name, critics too, share one copy of what is frozen
    for parameter, weight in model.named_parameters():
        parameter = parameter.removeprefix(f"{model.base_model_prefix}.")
        weight.data = frozen.setdefault((name, parameter), weight.data)
    is_agent = model.get_output_embeddings() is not None
    routers = []  # of experts: linear layers that give more than a tensor
    for module, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and not torch.is_tensor(layer(layer.weight[:1])):
            routers.append(module)
    config = peft.LoraConfig(
        r=lora_rank,
        lora_alpha=2 * lora_rank,
        target_modules="all-linear",
        exclude_modules=routers,
        task_type="CAUSAL_LM" if is_agent else "FEATURE_EXTRACTION",
    )
    model = peft.get_peft_model(model, config)
    if is_agent and adapter.exists():  # it goes on with what another run has trained
        found = peft.set_peft_model_state_dict(model, peft.load_peft_weights(adapter))
        if found.unexpected_keys:
            raise UserError(f"its adapter does not fit: {found.unexpected_keys[0]}, ...")
    return model


def freeze(model: nn.Module, args: Args) -> None:
    """Train nothing of a model; what autocast would cast to bfloat16 each time becomes that."""
    model.requires_grad_(False)
    for module in model.get_decoder().modules():
        weights = list(module.parameters(recurse=False))
        is_end = isinstance(module, nn.Embedding) or module is model.get_output_embeddings()
        if args.dtype == "bfloat16" and not is_end and any(w.dim() > 1 for w in weights):
            for weight in weights:
                weight.data = weight.data.to(torch.bfloat16)


def trained_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict without frozen weights, which are those of --model."""
    parameters = model.named_parameters(remove_duplicate=False)
    frozen = {name for name, p in parameters if not p.requires_grad}
    return {name: x for name, x in model.state_dict().items() if name not in frozen}


def max_length(model: nn.Module) -> float:
    """Tokens that a model reads: its positions, or where it begins to read in another way."""
    config = model.config.get_text_config()
    limits = [getattr(config, "max_position_embeddings", None) or inf]
    if hasattr(config, "floor_scale"):  # Llama 4 counts columns of a cache, a prompt beyond all
        limits.append(config.floor_scale // 2)
    if any(x.dtype == torch.bool and x.dim() == 4 for x in model.buffers()):
        limits.append(limits[0] // 2)  # so do layers with a mask of their own (GPT-Neo)
    ropes = getattr(config, "rope_parameters", None) or {}
    for rope in (ropes, *ropes.values()):  # one of all layers, or one of each kind of them
        if isinstance(rope, dict) and rope.get("rope_type") == "longrope":
            limits.append(rope["original_max_position_embeddings"])  # beyond it all keys turn
    return min(limits)


def shortest_window(model: nn.Module) -> float:
    """Tokens that all layers of a model attend to at once."""
    config = model.config.get_text_config()
    names = ["sliding_window", "attention_chunk_size", "window_size"]
    return min(getattr(config, name, None) or inf for name in names)


def checkpoint_layers(model: nn.Module, on: bool) -> None:
    """Have layers keep only their inputs for the backward pass, as --gradient-checkpointing asks.

    What else training mode would switch on, e.g. noise in the choice of experts, stays off.
    """
    for module in model.modules():
        module.training = on and getattr(module, "gradient_checkpointing", False)


class Chat:
    """How a chat template frames the turns of an episode, found by rendering marked texts."""

    def __init__(self, tokenizer, eos: set[int]):
        self.tokenizer = tokenizer
        self.eos = eos  # the ids that end a response
        self.first = "", "\n"  # what stands before and after the user's text in the first turn
        self.later = "\n", "\n"  # and in later turns
        self.end = None  # the token with which the template ends a reply
        self.before_end = ""  # what it writes between a reply and that token
        self.strips = False  # whether it strips the user's text
        if tokenizer.chat_template:
            with naming("its chat template must take plain texts and print each once"):
                self.read_template()
        if not self.eos:
            raise UserError("no token ends a response: its tokenizer has no EOS")

    def render(self, *texts: str) -> str:
        """The chat of a user and an assistant in turn, up to where the next reply begins."""
        roles = ["user", "assistant"] * len(texts)
        chat = [{"role": role, "content": text} for role, text in zip(roles, texts)]
        options = {"add_generation_prompt": True, "enable_thinking": False}
        return self.tokenizer.apply_chat_template(chat, tokenize=False, **options)

    def read_template(self) -> None:
        """Find `first` and `later`, and how a reply ends."""
        before, after = self.render("<USER>").split("<USER>")
        self.first = before, after
        _, later = self.render("<ONE>", "<REPLY>", "<USER>").split("<REPLY>")
        before, after = later.split("<USER>")
        self.strips = "\t<USER>\t" not in self.render("\t<USER>\t")
        ids = self.encode(before)
        added = self.tokenizer.added_tokens_decoder
        special = [token for token in ids if token in added and added[token].special]
        ends = [token for token in ids if token in self.eos]
        ends += [token for token in special if token != self.tokenizer.bos_token_id]
        if ends:
            self.end = ends[0]
            self.eos = self.eos | {self.end}
            end = self.tokenizer.convert_ids_to_tokens(self.end)
            self.before_end, _, rest = before.partition(end)
            before = end + rest
        self.later = before, after
        reply = "<think>\n</think>\n\n<REPLY>"
        seen = self.render("<ONE>", reply, "<TWO>", reply, "<USER>")
        kept = reply.join(["<ONE>".join(self.first), later.replace("<USER>", "<TWO>"), later])
        if "".join(seen.split()) != "".join(kept.split()):
            name = self.tokenizer.name_or_path
            say(f"{name}: its chat template rewrites earlier turns; histories keep them as sampled")

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text; a chat template writes its own special tokens."""
        return self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]

    def frame(self, observation: str, history: list[int]) -> list[int]:
        """The tokens that an observation appends to a history; the history stays as it is."""
        if self.strips:
            observation = observation.strip()
        if not history:
            before, after = self.first
            return self.encode(before + observation + after, not self.tokenizer.chat_template)
        before, after = self.later
        tokens = self.encode(before + observation + after)
        if self.end is None:
            return tokens
        tokens = tokens[tokens.index(self.end) :]
        if history[-1] in self.eos:
            return tokens[1:]  # the agent itself has ended its turn
        return self.encode(self.before_end) + tokens


class Agent(nn.Module):
    """One policy pi_i: a causal LM, its tokenizer and chat, its temperature and optimizer."""

    def __init__(self, i: int, name: str, args: Args, device: torch.device, frozen: dict):
        super().__init__()
        self.name = f"agent {i} ({name})"
        self.reads = [i]
        self.temperature = args.temperature[i % len(args.temperature)]  # of all, or of each
        learning_rate = args.actor_lr[i % len(args.actor_lr)]
        self.model, self.tokenizer = load_model(AutoModelForCausalLM, name, args, device, frozen)
        check_causal(self.name, self.model)
        eos = self.model.generation_config.eos_token_id
        eos = eos if isinstance(eos, list) else [eos]
        with naming(self.name):
            check_layers(self.model)
            self.chat = Chat(self.tokenizer, {*eos, self.tokenizer.eos_token_id} - {None})
        self.longest_shared = 0  # tokens of a history that may share a row with others of its o_0
        self.logits_at_once = inf  # tokens whose logits the update makes at once
        self.trains = learning_rate > 0
        if not self.trains:
            freeze(self.model, args)
        self.optimizer = adamw(self, learning_rate) if self.trains else None
        self.reference = []  # a list, so that it is no submodule: neither trained nor saved
        if args.kl_coef and self.trains:
            reference, _ = load_model(AutoModelForCausalLM, name, args, device, frozen)
            freeze(reference, args)
            self.reference = [reference]

    def encode(self, e: "Episode", num_turns: int) -> tuple[list[int], list[int]]:
        """Its history h_it of an episode at turn t = num_turns - 1, and where that ends."""
        (i,) = self.reads
        observation = e.observations[i][num_turns - 1]
        tokens = e.tokens[i] + self.chat.frame(observation, e.tokens[i])
        return tokens, [len(tokens) - 1]

    @property
    def eos(self) -> set[int]:
        """The token ids that end a response."""
        return self.chat.eos

    def export(self, folder: Path) -> None:
        """Write a Hugging Face model, with LoRA a merged one, that samples as in training."""
        config = GenerationConfig(do_sample=True, temperature=self.temperature, top_k=0, top_p=1.0)
        config.eos_token_id = sorted(self.eos)
        config.pad_token_id = self.tokenizer.pad_token_id
        if config.pad_token_id is None:
            config.pad_token_id = config.eos_token_id[0]
        model = self.model
        if hasattr(model, "peft_config"):
            model.save_pretrained(folder / "adapter")
            model = merged(model)
        model.save_pretrained(folder)
        config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def merged(model: nn.Module) -> nn.Module:
    """A copy of a LoRA model's base, on the CPU, with its adapters added in."""
    copies = {}  # which deepcopy takes in place of the originals
    for p in model.parameters():
        dtype = torch.promote_types(p.dtype, torch.float32)  # bfloat16 would round the adapters
        copies[id(p)] = nn.Parameter(p.detach().to("cpu", dtype, copy=True))
    return copy.deepcopy(model, copies).merge_and_unload()


def adamw(model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """The optimizer of what a model trains."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0, fused=True)


def optimize(model: nn.Module, max_grad_norm: float) -> torch.Tensor:
    """Sum the gradient over ranks, clip it, step. Gives its norm before clipping, ()."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        if p.grad is None:  # e.g. an expert that no token of this rank has reached
            p.grad = torch.zeros_like(p)
    all_sum(*(p.grad for p in trained))
    norm = nn.utils.clip_grad_norm_(trained, max_grad_norm)
    if not norm.isfinite():
        raise FloatingPointError(f"{model.name}: its gradient norm is {norm}")
    model.optimizer.step()
    model.optimizer.zero_grad()
    return norm


# =========================================== generate ===========================================
class RowsLayer(DynamicLayer):
    """Keys and values of one layer in buffers with room to grow, (B, heads, columns, width).

    A forward of k rows writes and reads the first k rows.
    """

    key_buffer = value_buffer = None
    is_compileable = True  # so that a mask of one token is made without asking a GPU about it

    def update(self, keys, values, *args, **kwargs):
        """Append new columns; gives all keys and values of the rows that are read."""
        start = self.get_seq_length()
        end = start + keys.shape[2]
        keys = keys.to(values.dtype)  # autocast leaves rotated keys in float32
        self.key_buffer = self.write(self.key_buffer, keys, start, end)
        self.value_buffer = self.write(self.value_buffer, values, start, end)
        self.keys = self.key_buffer[: len(keys), :, :end]
        self.values = self.value_buffer[: len(values), :, :end]
        self.is_initialized = True
        return self.keys, self.values

    @staticmethod
    def write(buffer, new, start: int, end: int) -> torch.Tensor:
        """Put new (k, heads, end - start, width) into a buffer, a wider one if it is full."""
        if buffer is None:
            return new
        missing = end - buffer.shape[2]
        if missing > 0:
            buffer = F.pad(buffer, (0, 0, 0, missing + 64))
        buffer[: len(new), :, start:end] = new
        return buffer

    def select(self, rows: torch.Tensor, columns: torch.Tensor) -> None:
        """Keep these columns (B, columns) of these rows (B,), in this order."""
        places = rows[:, None], slice(None), columns
        self.keys = self.key_buffer = self.key_buffer[places].transpose(1, 2)
        self.values = self.value_buffer = self.value_buffer[places].transpose(1, 2)

    def move(self, source: torch.Tensor, to: torch.Tensor) -> None:
        """Put rows `source` in the places `to`."""
        self.key_buffer[to] = self.key_buffer[source]
        self.value_buffer[to] = self.value_buffer[source]


class RowsCache(Cache):
    """KV cache of the episodes that an agent plays, a row each.

    mask: (B, columns), 0 where a column holds no token of that row's history.
    row_of: (B,), the row of each episode, in the order in which `generate` was given them.
    """

    def __init__(self):
        super().__init__(layer_class_to_replicate=RowsLayer)
        self.mask = self.row_of = None

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows, in this order; a row may be repeated. Holes go to their beginnings.

        So columns are as far apart as tokens are in a history: windows of attention count them.
        """
        mask = self.mask[rows]
        holes = mask.shape[1] - int(mask.sum(1).max())  # in all rows
        columns = mask.argsort(stable=True)[:, holes:]  # (B, columns)
        self.mask = mask.gather(1, columns)
        for layer in self.layers:
            layer.select(rows, columns)

    def move(self, source: torch.Tensor, to: torch.Tensor) -> None:
        """Put rows `source` in the places `to`."""
        self.mask[to] = self.mask[source]
        for layer in self.layers:
            layer.move(source, to)


def prefill(agent: Agent, prompts: list[list[int]], cache: RowsCache) -> None:
    """Read a prompt into each row of the cache, longest first; others have holes at their ends.

    It reads an eighth of the columns at a time, without the rows that have ended. What padding is
    left is a hole only afterwards: here it sees itself, so that no query sees no key.
    """
    device = agent.model.device
    ids = pad_sequence([torch.tensor(x, dtype=torch.long) for x in prompts], batch_first=True)
    ids = ids.to(device)  # (p, S)
    lengths = torch.tensor([len(x) for x in prompts], device=device)[:, None]  # (p, 1)
    columns = torch.arange(ids.shape[1], device=device)  # (S,)
    real = (columns < lengths).long()  # (p, S)
    past = real[:, :0] if cache.mask is None else cache.mask  # (p, columns), at first none
    cache.mask = torch.cat([past, real], 1)  # (p, columns)
    seen = torch.cat([past, torch.ones_like(real)], 1)  # (p, columns)
    places = columns.minimum((lengths - 1).clamp(min=0))  # (p, S), those of padding too
    places = past.sum(1, keepdim=True) + places  # (p, S)
    width = max(8, ids.shape[1] // 8)
    for start in range(0, ids.shape[1], width):
        end = start + width
        k = sum(len(x) > start for x in prompts) if start > 0 else len(prompts)
        agent.model(
            ids[:k, start:end],
            attention_mask=seen[:k, : past.shape[1] + end],
            position_ids=places[:k, start:end],
            past_key_values=cache,
            logits_to_keep=1,
        )


def read_prompts(agent: Agent, prompts: list[list[int]], cache: RowsCache) -> torch.Tensor:
    """Read all but the last token of each prompt; gives (B,), the prompt that a row is of."""
    device = agent.model.device
    if cache.mask is not None:
        order = sorted(range(len(prompts)), key=lambda k: -len(prompts[k]))
        cache.select(cache.row_of[order])
        prefill(agent, [prompts[k][:-1] for k in order], cache)
        cache.select(torch.arange(len(order), device=device))
        return torch.tensor(order, device=device)
    number = {}  # of each different prompt: equal ones are read once
    for prompt in sorted(map(tuple, prompts), key=len, reverse=True):
        number.setdefault(prompt, len(number))
    prefill(agent, [list(prompt[:-1]) for prompt in number], cache)
    rows = [number[tuple(prompt)] for prompt in prompts]
    cache.select(torch.tensor(rows, device=device))
    return torch.arange(len(prompts), device=device)


def sample(logits: torch.Tensor, temperature: float, uniform: torch.Tensor):
    """Invert the distribution function at numbers of (0, 1]: tokens and log-probs, (k, 1) each.

    logits (k, V), uniform (k, 1). In float64, in which no token's share is rounded away.
    """
    logp = (logits / temperature).log_softmax(-1)  # (k, V)
    cdf = logp.exp().cumsum(-1, dtype=torch.float64)  # (k, V)
    tokens = torch.searchsorted(cdf, uniform * cdf[:, -1:])  # (k, 1)
    tokens = tokens.clamp(max=logits.shape[1] - 1)  # NaN would give V
    return tokens, logp.gather(1, tokens)


def swaps(going: torch.Tensor, num_going: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which rows change places, so that those that go on come first: (source, to).

    Of three rows [ended, going, going], two go on, so row 0 is a hole that row 2 fills: source is
    [2, 0], to is [0, 2]. Row 1 stays where it is.
    """
    holes = (~going[:num_going]).nonzero()[:, 0]
    fillers = num_going + going[num_going:].nonzero()[:, 0]
    return torch.cat([fillers, holes]), torch.cat([holes, fillers])


@torch.no_grad()  # inference mode would have autocast cast all weights at each token
def generate(agent, prompts, cache: RowsCache, uniforms: torch.Tensor):
    """Sample a response to each of B prompts: [(token ids, log-probs)], EOS included.

    prompts: what the cache lacks of each history, its last token at least.
    uniforms: (B, R) numbers of (0, 1] that make the choices; R is the longest response.
    The cache then holds all but the last token of each history. A GPU computes ahead of the host,
    which asks it only now and then who has ended; what is sampled after an EOS is left out.
    """
    prompt_of = read_prompts(agent, prompts, cache)  # (B,), the prompt that a row answers
    device = agent.model.device
    past = cache.mask.shape[1]
    asks_every = 16 if device.type == "cuda" else 1
    k, max_new_tokens = uniforms.shape  # the first k rows still decode
    uniforms = uniforms.to(device)  # (B, R)
    eos = torch.tensor(sorted(agent.eos), device=device)
    positions = cache.mask.sum(1, keepdim=True)  # (B, 1), of the first token that is read
    cache.mask = F.pad(cache.mask, (0, max_new_tokens), value=1)  # (B, past + R)
    tokens = torch.tensor([prompt[-1:] for prompt in prompts], device=device)[prompt_of]  # (B, 1)
    sampled = tokens.new_full(uniforms.shape, -1)  # (B, R)
    logps = torch.zeros(uniforms.shape, dtype=torch.float64, device=device)  # (B, R)
    for step in range(max_new_tokens):
        out = agent.model(
            tokens[:k],
            attention_mask=cache.mask[:k, : past + step + 1],
            position_ids=positions[:k] + step,
            past_key_values=cache,
            logits_to_keep=1,
        )
        logits = out.logits[:, -1].to(agent.model.dtype)  # (k, V)
        answered = prompt_of[:k]
        tokens[:k], logp = sample(logits, agent.temperature, uniforms[answered, step, None])
        sampled[answered, step] = tokens[:k, 0]
        logps[answered, step] = logp[:, 0].double()
        if (step + 1) % asks_every > 0:
            continue
        newest = sampled[answered, step + 1 - asks_every : step + 1]  # (k, asks_every)
        going = ~torch.isin(newest, eos).any(1)  # (k,)
        num_going = int(going.sum())
        if num_going < k:
            source, to = swaps(going, num_going)
            cache.move(source, to)
            for rows in (tokens, positions, prompt_of):
                rows[to] = rows[source]
            k = num_going
        if k == 0:
            break
    ended = torch.isin(sampled, eos).long()  # (B, R)
    kept = ended.cumsum(1) == ended  # (B, R), up to the first EOS
    cache.mask = torch.cat([cache.mask[:, :past], kept[prompt_of, : step + 1]], 1)
    cache.row_of = prompt_of.argsort()
    if not logps[kept].isfinite().all():
        raise FloatingPointError(f"{agent.name}: its logits are not finite")
    lists = sampled.tolist(), logps.tolist(), kept.sum(1).tolist()
    return [(ids[:length], logp[:length]) for ids, logp, length in zip(*lists, strict=True)]


# =========================================== logprobs ===========================================
def microbatches(lengths: list[int], budget: int, group: int = 1):
    """Lists of rows of like length, of `budget` tokens at most, a tenth of them padding at most.

    `group` consecutive rows, which may share a beginning, stay together. A list holds one group at
    least, however long.
    """
    sizes = [sum(lengths[k : k + group]) for k in range(0, len(lengths), group)]
    rows, total = [], 0
    for unit in sorted(range(len(sizes)), key=sizes.__getitem__):
        total += sizes[unit]
        padded = (len(rows) // group + 1) * sizes[unit]
        if rows and (padded > budget or total < 0.9 * padded):
            yield rows
            rows, total = [], sizes[unit]
        rows = [*rows, *range(unit * group, (unit + 1) * group)]
    if rows:
        yield rows


def share_prefixes(tokens: list[list[int]], turns: list[list[int]], share: float) -> torch.Tensor:
    """b histories in p rows, those of one o_0 in one row: (p, S, 4) of (token, turn, episode, s).

    A row holds o_0 but for its last token, as of episode -1, then the rest of each history, which
    that last token begins, since it predicts the first token of a response. s is the place of a
    token in its history; padding is -1. Where one is longer than `share`, or sharing makes more
    padding than it saves, each history has a row of its own.
    """
    rows = {}
    longest = max(map(len, tokens))
    for k, (ids, marks) in enumerate(zip(tokens, turns, strict=True)):
        start = marks.index(0) - 1
        prefix = tuple(ids[:start]) if longest <= share else k
        if prefix not in rows:
            rows[prefix] = [(token, -1, -1, s) for s, token in enumerate(ids[:start])]
        rows[prefix] += [(ids[s], marks[s], k, s) for s in range(start, len(ids))]
    size = len(rows) * max(len(row) for row in rows.values())
    if share and size > len(tokens) * longest:
        return share_prefixes(tokens, turns, share=0)
    rows = [torch.tensor(row) for row in rows.values()]
    return pad_sequence(rows, batch_first=True, padding_value=-1)


def shared_mask(episodes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Additive attention mask (p, 1, S, S) of rows in which several episodes share a beginning.

    episodes: (p, S), the episode of each token, -1 for the beginning, which all of them see.
    """
    same = episodes[:, :, None] == episodes[:, None]  # (p, S, S), of [query, key]
    seen = (same | (episodes[:, None] < 0)).tril()  # (p, S, S)
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill(~seen, torch.finfo(dtype).min)[:, None]


@contextlib.contextmanager
def headless(model: nn.Module):
    """Within it a model gives what its head reads, in place of logits. Gives the head's forward."""
    head = model.get_output_embeddings()
    forward = head.forward
    head.forward = lambda hidden: hidden
    try:
        yield forward
    finally:
        head.forward = forward


def logprobs(model, episodes, i: int, num_turns: int, temperature: float, share=0, split=inf):
    """log pi_i(a_t | h_t) of all turns of b episodes, from one forward: (T, b), 0 at dead turns.

    It is the sum over the tokens of the response, EOS included if it has one. Also gives how much
    these n tokens' log-probs differ from when they were sampled, (n,). Of more than `split` tokens
    the logits are made in parts, and again for the backward pass: they would be large.
    """
    rows = share_prefixes([e.tokens[i] for e in episodes], [e.turns[i] for e in episodes], share)
    following = rows.roll(-1, 1)  # (p, S, 4), the next token of each; the last has none
    k, s = (following[..., 1] >= 0).nonzero(as_tuple=True)  # (n,) each: that one was sampled
    counts = k.bincount().tolist()
    keep = pad_sequence(s.split(counts), batch_first=True)  # (p, m), where in a row it was
    c = torch.cat([torch.arange(count) for count in counts])  # (n,), which of these
    action, turn, owner, s = following[k, s].unbind(-1)  # (n,) each
    sampled = [torch.tensor(e.logps[i], dtype=model.dtype) for e in episodes]
    sampled = pad_sequence(sampled)[s, owner]  # (n,)
    # All that would have a GPU wait for the host is done: it gets what it computes with
    given = rows, keep, k, c, action, turn, owner, sampled
    moved = [x.to(model.device, non_blocking=True) for x in given]
    rows, keep, k, c, action, turn, owner, sampled = moved
    options = {}
    if len(rows) < len(episodes):  # else causal attention alone keeps the padding out
        options["attention_mask"] = shared_mask(rows[..., 2], model.dtype)
        options["position_ids"] = rows[..., 3].clamp(min=0)
    in_parts = len(k) > split
    with headless(model) if in_parts else contextlib.nullcontext(nn.Identity()) as head:
        out = model(rows[..., 0].clamp(min=0), use_cache=False, logits_to_keep=keep, **options)
    hidden = out.logits[k, c]  # (n, V), or what the head reads, (n, D)

    def compute(hidden, action):
        logits = head(hidden).to(model.dtype) / temperature  # (n, V)
        return -F.cross_entropy(logits, action, reduction="none")  # (n,)

    if in_parts:
        parts = zip(hidden.split(split), action.split(split))
        logp = torch.cat([checkpoint(compute, *part, use_reentrant=False) for part in parts])
    else:
        logp = compute(hidden, action)
    total = logp.new_zeros(num_turns, len(episodes))  # (T, b)
    total = total.index_put((turn, owner), logp, accumulate=True)
    return total, logp.detach() - sampled


# ============================================ rollout ============================================
@dataclass
class Episode:
    """One episode. It only grows, turn by turn; nothing in it is ever rewritten."""

    number: int  # among those of its iteration, over all ranks: it seeds the sampling
    item: dict
    tokens: list[list[int]]  # [agent] h_i and its last response: the ids as read and as sampled
    turns: list[list[int]]  # [agent] for each token the turn of its response; -1 in observations
    logps: list[list[float]]  # [agent] for each token its log-prob when sampled; 0 in observations
    observations: list[list[str]]  # [agent][turn]
    actions: list[list[str]]  # [agent][turn]
    rewards: list[float] = field(default_factory=list)  # [turn] raw reward + shift
    infos: list[dict] = field(default_factory=list)  # [turn] metrics of the task
    too_long: bool = False  # ended because somebody can not read what comes next

    @classmethod
    def start(cls, number: int, item: dict, num_agents: int) -> "Episode":
        """An episode in which nothing has been said."""
        lists = [[[] for _ in range(num_agents)] for _ in range(5)]  # tokens to actions
        return cls(number, item, *lists)


def start_episodes(items: list[dict], num_agents: int) -> list[Episode]:
    """An episode of each item that is this rank's: consecutive ones."""
    start = rank() * len(items) // world_size()
    end = (rank() + 1) * len(items) // world_size()
    return [Episode.start(k, items[k], num_agents) for k in range(start, end)]


def observe(e: Episode, observations: list[str]) -> None:
    """Tell each agent what it observes."""
    for texts, observation in zip(e.observations, observations, strict=True):
        texts.append(observation)


def act(i: int, agent, episodes, cache, uniforms) -> None:
    """Agent i reads its newest observation in each episode, and responds."""
    frames, prompts = [], []
    for e in episodes:
        frame = agent.chat.frame(e.observations[i][-1], e.tokens[i])
        frames.append(frame)
        prompts.append(e.tokens[i][-1:] + frame)  # its last token is not in the cache yet
    responses = generate(agent, prompts, cache, uniforms)
    for e, frame, (ids, logps) in zip(episodes, frames, responses, strict=True):
        turn = len(e.actions[i])
        e.tokens[i] += frame + ids
        e.turns[i] += [-1] * len(frame) + [turn] * len(ids)
        e.logps[i] += [0.0] * len(frame) + logps
        e.actions[i].append(agent.tokenizer.decode(ids, skip_special_tokens=True))


def needed(reader, e: Episode, more: int) -> int:
    """Tokens of all that an agent or a critic reads of an episode, and `more` of each response."""
    tokens, _ = reader.encode(e, len(e.rewards) + 1)
    return len(tokens) + more * len(reader.reads)


def rollout(task, episodes, agents, args: Args, purpose: str, iteration: int, critics=()) -> None:
    """Play these episodes, all in parallel; each ends after num_turns turns or at success."""
    shift = task.reward_shift if args.reward_shift is None else args.reward_shift
    success = task.success if args.success is None else args.success
    limit = args.max_new_tokens or task.max_new_tokens
    readers = [*agents, *critics]
    caches = [RowsCache() for _ in agents]
    for e in episodes:
        observe(e, task.observe(e.item))
    going = episodes
    for turn in range(task.num_turns):
        for i, agent in enumerate(agents):
            streams = [rng(args.seed, purpose, iteration, e.number, i, turn) for e in going]
            uniforms = np.stack([1 - stream.random(limit) for stream in streams])  # (B, R)
            # Weights are cast to bfloat16 once for all tokens of a response
            with torch.autocast(agent.model.device.type, torch.bfloat16, args.dtype == "bfloat16"):
                act(i, agent, going, caches[i], torch.tensor(uniforms))
        joint_actions = [[actions[turn] for actions in e.actions] for e in going]
        scores = score_batch(task, [e.item for e in going], joint_actions)
        kept = []
        for k, (e, (reward, info)) in enumerate(zip(going, scores, strict=True)):
            e.rewards.append(reward + shift)
            e.infos.append(info)
            if turn + 1 < task.num_turns and reward < success:
                observe(e, task.feedback(e.item, joint_actions[k], info, turn))
                # Nor does it go on where an agent or a critic has no room for what comes next
                e.too_long = any(needed(x, e, limit) > max_length(x.model) for x in readers)
                if not e.too_long:
                    kept.append(k)
        if not kept:
            break
        going = [going[k] for k in kept]
        for cache in caches:
            cache.row_of = cache.row_of[kept]


# ============================================ update ============================================
def gae(rewards, values, live, gamma: float, gae_lambda: float) -> torch.Tensor:
    """Generalised advantages over turns: rewards, values (T, B, N) and live (T, B) -> (T, B, N).

    With gae_lambda 0 they are TD errors; with gae_lambda 1 and values 0, returns-to-go.
    """
    advantages = torch.zeros_like(values)
    advantage = next_value = torch.zeros_like(values[0])
    for t in reversed(range(len(values))):
        # TD error: delta_t = r_t + gamma V(h_{t+1}) - V(h_t)
        delta = rewards[t] + gamma * next_value - values[t]
        # GAE (1506.02438): A_t = delta_t + gamma lambda A_{t+1}
        advantage = (delta + gamma * gae_lambda * advantage) * live[t][:, None]
        advantages[t] = advantage
        next_value = values[t] * live[t][:, None]  # so that the last live turn bootstraps 0
    return advantages


def live_mean(x: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    """Mean over the live turns of all ranks: (T, B, N) -> (N,)."""
    return all_sum((x * live[..., None]).sum((0, 1))) / all_sum(live.sum())


def live_variance(x: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    """Variance over the live turns of all ranks: (T, B, N) -> (N,)."""
    return live_mean((x - live_mean(x, live)) ** 2, live)


def turn_variance(x: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    """Variance over the episodes of all ranks within a turn, mean of turns: (T, B, N) -> (N,)."""
    count = all_sum(live.sum(1)).clamp(min=1)[:, None]  # (T, 1)
    mean = all_sum((x * live[..., None]).sum(1)) / count  # (T, N)
    return live_mean((x - mean[:, None]) ** 2, live)


def normalise(advantages, returns, live) -> torch.Tensor:
    """(A - mean) / sd of each agent over live turns, (T, B, N); 0 where there is no signal.

    There is none where the advantages do not differ, or the returns of a turn do not: what differs
    then is the critic's own error. What is rounding is told by the size of the returns.
    """
    rounding = 1e-12 * live_mean(returns**2, live) + 1e-18  # (N,)
    alone = all_sum(live[0].sum()) == 1  # an episode by itself has no other returns to differ from
    differ = turn_variance(returns, live) > rounding  # (N,)
    variance = live_variance(advantages, live)  # (N,)
    advantages = (advantages - live_mean(advantages, live)) / variance.clamp(min=1e-30).sqrt()
    return advantages * ((variance > rounding) & (differ | alone))


def stack_rewards(episodes: list[Episode], num_turns: int, agents):
    """Rewards (T, B, N), 0 at dead turns, and which turns are live, (T, B)."""
    # In float64, so that equal returns stay equal
    rewards = torch.zeros(num_turns, len(episodes), len(agents), dtype=torch.float64)
    live = torch.zeros(num_turns, len(episodes), dtype=torch.bool)
    for k, e in enumerate(episodes):
        rewards[: len(e.rewards), k] = torch.tensor(e.rewards, dtype=torch.float64)[:, None]
        live[: len(e.rewards), k] = True
    device = agents[0].model.device
    return rewards.to(device), live.to(device)


def actor_step(i: int, agent: Agent, episodes, advantages, live, args: Args):
    """One gradient step of agent i on its advantages (T, B): log pi(a_t | h_t), (T, B), metrics."""
    num_turns = len(live)
    num_live = all_sum(live.sum())
    logps = torch.zeros_like(advantages)  # (T, B)
    kl, gap, norm = torch.zeros(3, dtype=torch.float64, device=live.device)
    checkpoint_layers(agent, args.gradient_checkpointing)
    lengths = [len(e.tokens[i]) for e in episodes]
    options = i, num_turns, agent.temperature, agent.longest_shared, agent.logits_at_once
    for rows in microbatches(lengths, args.microbatch_tokens, args.num_generations):
        batch = [episodes[k] for k in rows]
        rows = torch.tensor(rows).to(live.device, non_blocking=True)  # (b,)
        with torch.set_grad_enabled(agent.trains):
            logp, difference = logprobs(agent.model, batch, *options)  # (T, b), (n,)
        # Policy gradient: grad log pi_i(a_it | h_it) A_it, mean over live turns
        loss = -(logp * advantages[:, rows]).sum() / num_live
        if agent.reference:
            with torch.no_grad():
                reference, _ = logprobs(agent.reference[0], batch, *options)  # (T, b)
            # KL penalty: grad KL(pi || reference) = E[grad log pi (log pi - log reference)]
            log_ratio = logp.detach() - reference  # (T, b)
            loss = loss + args.kl_coef * (logp * log_ratio).sum() / num_live
            kl += log_ratio.sum()
        if agent.trains:
            loss.backward()
        gap += difference.abs().sum()
        logps[:, rows] = logp.detach().double()
    agent.eval()
    if agent.trains:
        norm += optimize(agent, args.max_grad_norm)
    num_tokens = sum(turn >= 0 for e in episodes for turn in e.turns[i])
    num_ended = sum(e.tokens[i][-1] in agent.eos for e in episodes)
    num_tokens, num_ended, num_episodes = logps.new_tensor([num_tokens, num_ended, len(episodes)])
    gain, total = (logps * advantages).sum(), logps.sum()
    all_sum(kl, gap, gain, total, num_tokens, num_ended, num_episodes)
    return logps, {
        "losses/policy_loss": -gain / num_live,
        "losses/entropy": -total / num_tokens,  # of a token
        "losses/grad_norm": norm,
        "losses/kl": kl / num_live,
        "losses/sampling_gap": gap / num_tokens,  # mean |log-prob trained - log-prob sampled|
        "charts/response_length": num_tokens / num_live,
        "charts/eos_rate": num_ended / num_episodes,  # of last responses
    }


def baselines(returns, live, num_generations: int, kind: str) -> torch.Tensor:
    """Baseline of each return (T, B, N), over the K episodes of its item that play that turn."""
    g = returns.unflatten(1, (-1, num_generations))  # (T, B / K, K, N)
    m = live.unflatten(1, (-1, num_generations))[..., None]  # (T, B / K, K, 1)
    total, count = (g * m).sum(2, keepdim=True), m.sum(2, keepdim=True)  # (T, B / K, 1, N)
    baseline = torch.zeros_like(g)
    if kind == "mean":
        baseline = total / count.clamp(min=1)
    elif kind == "rloo":  # where one alone is left, it learns nothing
        baseline = torch.where(count > 1, (total - g) / (count - 1).clamp(min=1), g)
    elif kind == "max":
        baseline = g.masked_fill(~m, -torch.inf).amax(2, keepdim=True)
    baseline = baseline.expand_as(g).masked_fill(~m, 0.0).flatten(1, 2)  # (T, B, N)
    # Equal returns have this very baseline, whatever the rounding of their mean
    return torch.where((returns - baseline).abs() <= 1e-9 * returns.abs(), returns, baseline)


def update(episodes, agents, critics, num_turns: int, args: Args, iteration: int):
    """One gradient step of each model for each minibatch of whole episodes.

    Gives {metric: [agent]}, means over the minibatches and over the episodes of all ranks.
    """
    metrics = []
    groups = np.arange(len(episodes)).reshape(-1, args.num_generations)  # (B / K, K)
    order = rng(args.seed, "minibatches", iteration, rank()).permutation(groups).flatten()
    for index in np.split(order, args.num_minibatches):
        minibatch = [episodes[k] for k in sorted(index)]
        # 1. Rewards r_t and returns-to-go G_t, and which turns each episode played
        rewards, live = stack_rewards(minibatch, num_turns, agents)  # (T, B, N), (T, B)
        returns = gae(rewards, torch.zeros_like(rewards), live, args.gamma, 1.0)  # (T, B, N)
        # 2. Baselines of the returns, over the K episodes of an item
        values = baselines(returns, live, args.num_generations, args.baseline)  # (T, B, N)
        # 3. Advantages A_t, the same for all agents
        advantages = returns - values  # (T, B, N)
        # 4. Normalisation for each agent, where there is a signal
        advantage_variance = live_variance(advantages, live)  # (N,)
        if args.norm_adv:
            advantages = normalise(advantages, returns, live)
        # 5. A step of each agent along its policy gradient
        steps = []
        for i, agent in enumerate(agents):
            steps.append(actor_step(i, agent, minibatch, advantages[..., i], live, args))
        # 6. Metrics
        learned = {name: torch.stack([x[name] for _, x in steps]) for name in steps[0][1]}
        learned["losses/explained_variance"] = explained_variance(returns, values, live)
        learned["losses/advantage_variance"] = advantage_variance
        metrics.append(learned)
    means = {name: torch.stack([x[name] for x in metrics]).mean(0).tolist() for name in metrics[0]}
    # Only the first minibatch meets the weights that sampled it
    return means | {"losses/sampling_gap": metrics[0]["losses/sampling_gap"].tolist()}


def explained_variance(returns, values, live) -> torch.Tensor:
    """1 - var(G - V) / var(G) over live turns, (N,); NaN where all returns are equal."""
    total = live_variance(returns, live)  # (N,)
    total = total.masked_fill(total <= 1e-12 * live_mean(returns**2, live), torch.nan)
    return 1 - live_variance(returns - values, live) / total


# =========================================== evaluate ===========================================
def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased chance that one of k <= n samples passes, if c of n did (2107.03374, eq. 1)."""
    return 1.0 - comb(n - c, k) / comb(n, k)


def summarize(episodes: list[Episode], samples: int = 1) -> dict[str, float]:
    """Means of the episodes' last metrics, `samples` of an item in a row, and pass@k of these."""
    infos = [e.infos[-1] for e in episodes]
    names = [name for name, value in infos[0].items() if isinstance(value, (int, float))]
    summary = {name: sum(info[name] for info in infos) / len(infos) for name in names}
    if "pass@1" in summary:
        passed = [info["pass@1"] == 1.0 for info in infos]
        counts = [sum(passed[k : k + samples]) for k in range(0, len(passed), samples)]
        for k in range(1, samples + 1):
            summary[f"pass@{k}"] = sum(pass_at_k(samples, c, k) for c in counts) / len(counts)
    summary["too_long"] = sum(e.too_long for e in episodes) / len(episodes)
    summary["episodic_return"] = sum(sum(e.rewards) for e in episodes) / len(episodes)
    return summary


def evaluate(task, agents, args: Args, writer, global_step: int, samples: int = 4):
    """Play `samples` episodes of each held-out item; log metrics and a few episodes, print a line.

    Gives ({metric: value}, episodes of all ranks).
    """
    start = time.time()
    items = task.eval[: max(1, args.eval_episodes // samples)]
    mine = start_episodes([item for item in items for _ in range(samples)], len(agents))
    at_once = max(args.num_envs, 64) // world_size()
    for k in range(0, len(mine), at_once):
        rollout(task, mine[k : k + at_once], agents, args, "evaluation", 0)
    episodes = gather(mine)
    metrics = summarize(episodes, samples)
    num_tokens = sum(turn >= 0 for e in episodes for turns in e.turns for turn in turns)
    metrics["tokens"] = num_tokens / len(episodes)
    metrics["time"] = (time.time() - start) / len(episodes)
    shown = [f"{name} {x:.3f}" for name, x in metrics.items()]
    say(f"held-out at step {global_step}: {', '.join(shown)}")
    if writer:
        for name, value in metrics.items():
            writer.add_scalar(f"eval/{name}", value, global_step)
        for k, episode in enumerate(episodes[::samples][:4]):
            writer.add_text(f"episodes/{k}", transcript(task, episode), global_step)
    return metrics, episodes


def transcript(task, episode: Episode) -> str:
    """A whole episode as Markdown."""
    lines = []
    for turn, reward in enumerate(episode.rewards):
        actions = [actions[turn] for actions in episode.actions]
        for i, action in enumerate(actions):
            lines += [f"=== turn {turn}, agent {i} is told", episode.observations[i][turn]]
            lines += ["=== and answers", action]
        lines += [f"=== reward {reward:.3f}", task.render(episode.item, actions)]
    return "\n".join("    " + line for line in "\n".join(lines).splitlines())


# ==================================== checks before training ====================================
def check_gaps(agents, gaps: list[float], dtype: str) -> None:
    """UserError if log-probs of sampled tokens differ by more than rounding in the update."""
    tolerance = 0.1 if dtype == "bfloat16" else 0.01  # TF32 keeps ten bits
    for agent, gap in zip(agents, gaps, strict=True):
        if not gap <= tolerance:
            told = f"the log-prob of a token differs by {gap:.2g}, more than {tolerance}"
            raise UserError(f"{agent.name}: what it samples is not what is trained: {told}")


def check_layers(model: nn.Module) -> None:
    """UserError for layers that keep more of a history than keys and values of single tokens."""
    config = model.config.get_text_config()
    kinds = {type(layer) for layer in DynamicCache(config=config).layers}
    if model._is_stateful or not kinds <= {DynamicLayer, DynamicSlidingWindowLayer}:
        raise UserError("its layers keep a state, which episodes can not share and leave")


def check_causal(name: str, model: nn.Module) -> int:
    """The width of what a model says; UserError if it is not finite, or not causal."""
    ids = torch.arange(2, device=model.device)[None]
    with naming(name), torch.no_grad():
        alone = model(input_ids=ids[:, :1], use_cache=False)[0]  # (1, 1, V) or (1, 1, D)
        both = model(input_ids=ids, use_cache=False)[0]  # (1, 2, V) or (1, 2, D)
        if not both.isfinite().all():
            raise UserError("what it computes is not finite: its weights are broken")
        change = (both[:, :1] - alone).abs().max()
        if change > 0.1 * alone.abs().max():
            raise UserError("its attention is not causal: what it reads depends on what follows")
    return both.shape[-1]


def check_sampling(task, agents, args: Args) -> None:
    """UserError if what an agent samples, in four short episodes, is not what is trained."""
    limit = min(4, args.max_new_tokens or task.max_new_tokens)
    item = min(task.train, key=lambda item: len("".join(task.observe(item))))
    for i, agent in enumerate(agents):
        episodes = [Episode.start(k, item, len(agents)) for k in range(4)]
        cache = RowsCache()
        for e, cut in zip(episodes, [0, 0, 8, 16], strict=True):  # two may share their o_0
            observe(e, [text[cut:] for text in task.observe(item)])
        with naming(f"{agent.name}: can not be sampled from"):
            for turn in range(min(2, task.num_turns)):
                uniforms = 1 - rng(args.seed, "check", i, turn).random((4, limit))
                act(i, agent, episodes, cache, torch.tensor(uniforms))
                for k, e in enumerate(episodes):
                    observe(e, ["go on " * k] * len(agents))
        options = i, task.num_turns, agent.temperature
        with torch.no_grad():
            _, difference = logprobs(agent.model, episodes, *options, share=0)
            gap = difference.abs().mean().item()
            check_gaps([agent], [gap], args.dtype)
            with contextlib.suppress(Exception):  # some have more than a head at their end
                _, parts = logprobs(agent.model, episodes, *options, split=1)
                if (parts - difference).abs().max() < 3 * gap + 1e-5:
                    config = agent.model.config.get_text_config()
                    agent.logits_at_once = 2**26 // config.vocab_size  # float32 logits of 256 MB
            with contextlib.suppress(Exception):  # some read no masks but their own
                _, difference = logprobs(agent.model, episodes[:2], *options, share=inf)
                shares = difference.abs().mean().item() < 3 * gap + 1e-4
                # A row of several histories has no windows
                agent.longest_shared = shortest_window(agent.model) if shares else 0


def check_lengths(task, readers, num_agents: int, limit: int) -> None:
    """UserError names a row whose first observation and T responses are more than a model reads."""
    shortest = min(max_length(reader.model) for reader in readers)
    responses = task.num_turns * limit
    for item in [*task.train, *task.eval]:
        episode = Episode.start(0, item, num_agents)
        observe(episode, task.observe(item))
        num_bytes = sum(len(texts[0].encode()) for texts in episode.observations)
        if num_bytes + responses * num_agents < shortest - 1000:
            continue  # no token is less than a byte; a chat template writes less than 1000
        for reader in readers:
            length = needed(reader, episode, responses)
            most = max_length(reader.model)
            if length > most:
                place = item.get("place", "an item")
                told = f"first observation and {task.num_turns} responses are {length} tokens"
                raise UserError(f"{place}: {told}, {reader.name} reads {most}")


# ========================================== checkpoint ==========================================
@contextlib.contextmanager
def replacing(path: Path):
    """A path to write a file or a folder at, which takes the place of `path` once it is whole."""
    temporary = path.with_name(f"{path.name}.tmp")
    with naming(f"{path}: can not be written, what was saved before stays"):
        yield temporary
        if path.is_dir():
            shutil.rmtree(path)
        temporary.replace(path)


def save(run_dir: Path, writer, agents, models, args: Args, iteration: int, global_step: int):
    """Export the agents to agent_{i}/, then write a checkpoint; the last two checkpoints stay."""
    if not writer:  # another rank does it
        return
    writer.flush()
    for i, agent in enumerate(agents):
        folder = run_dir / f"agent_{i}"
        if agent.trains or not folder.exists():
            with replacing(folder) as temporary:
                agent.export(temporary)
    state = {
        "script": Path(__file__).stem,
        "args": asdict(args),
        "ranks": world_size(),
        "iteration": iteration,
        "global_step": global_step,
        "models": [(trained_weights(model), model.optimizer.state_dict()) for model in models],
    }
    with replacing(run_dir / f"checkpoint_{iteration:06d}.pt") as path:
        torch.save(state, path)
    for old in sorted(run_dir.glob("checkpoint_*.pt"))[:-2]:
        old.unlink()


def read_checkpoint(run_dir: Path) -> dict:
    """The newest checkpoint that can be read, on the CPU."""
    for path in sorted(run_dir.glob("checkpoint_*.pt"), reverse=True):
        with contextlib.suppress(Exception):  # a damaged file raises any of a dozen
            if zipfile.ZipFile(path).testzip() is None:  # torch does not see a bit that has flipped
                return torch.load(path, map_location="cpu", weights_only=True)
        say(f"warning: {path} can not be read, falling back to the one before")
    raise UserError("no checkpoint there that can be read")


def load_checkpoint(run_dir: Path, models, args: Args) -> tuple[int, int]:
    """Put models and optimizers back: (iteration, global_step)."""
    state = read_checkpoint(run_dir)
    if state["script"] != Path(__file__).stem:
        raise UserError(f"is a run of {state['script']}.py")
    # What changes only how long a run goes on, how it is watched, where and in which portions
    free = ["total_env_steps", "eval_every", "save_every", "track", "device", "resume", "run_name"]
    free += ["microbatch_tokens", "gradient_checkpointing"]
    kept = {name: value for name, value in asdict(args).items() if name not in free}
    changed = [name for name, value in kept.items() if value != state["args"].get(name)]
    if changed:
        raise UserError(f"the run has other values of {', '.join(changed)}")
    if state["ranks"] != world_size() and args.num_minibatches > 1:
        say(f"{run_dir} had {state['ranks']} ranks: its minibatches will be others from here on")
    for model, (weights, optimizer) in zip(models, state["models"], strict=True):
        model.load_state_dict(weights, strict=False)
        model.optimizer.load_state_dict(optimizer)
    return state["iteration"], state["global_step"]


# ============================================= main =============================================
def open_run(args: Args, global_step: int):
    """(run folder, TensorBoard writer) of a run; None is the writer of all ranks but the first."""
    default = f"{args.task}__{args.exp_name}__{args.seed}__{int(time.time())}"
    run_dir = Path(args.resume or f"runs/{args.run_name or default}")
    if rank() > 0:
        return run_dir, None
    if args.track:
        with naming("pip install wandb"):
            wandb = import_module("wandb")
        wandb.init(project="collm", name=run_dir.name, config=asdict(args), sync_tensorboard=True)
    with naming(f"{run_dir}: give another --run-name, or --resume it"):
        run_dir.mkdir(parents=True, exist_ok=bool(args.resume))
    with replacing(run_dir / "args.json") as path:
        path.write_text(json.dumps(asdict(args), indent=2))
    writer = SummaryWriter(run_dir, purge_step=global_step + 1 if args.resume else None)
    rows = "".join(f"|{name}|{value}|\n" for name, value in asdict(args).items())
    writer.add_text("hyperparameters", f"|name|value|\n|-|-|\n{rows}|ranks|{world_size()}|\n")
    return run_dir, writer


def stop_signal() -> list[int]:
    """A list to which Ctrl-C or SIGTERM adds; the second such signal ends the process at once."""
    stop = []

    def handle(number, frame):
        say("stopping after this iteration")
        stop.append(number)
        signal.signal(number, signal.SIG_DFL)

    signal.signal(signal.SIGINT, handle)
    signal.signal(signal.SIGTERM, handle)
    return stop


def log_training(writer, bar, args: Args, global_step: int, episodes, metrics, times) -> None:
    """Log an iteration: its episodes, the metrics of its update, seconds of (rollout, update)."""
    scalars = {f"charts/{name}": value for name, value in summarize(episodes).items()}
    for name, values in metrics.items():
        scalars[name] = sum(values) / len(values)
        scalars |= {f"{name}/agent_{i}": value for i, value in enumerate(values)}
    num_steps = sum(len(e.rewards) for e in episodes)
    num_tokens = num_steps * sum(metrics["charts/response_length"])
    scalars["charts/SPS"] = num_steps / sum(times)
    scalars["charts/tokens_per_second"] = num_tokens / sum(times)
    scalars["charts/learning_rate"] = sum(args.actor_lr) / len(args.actor_lr)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10  # of Linux, in KiB
    if torch.cuda.is_initialized():
        memory = torch.cuda.max_memory_allocated()
    scalars["charts/peak_memory_gb"] = memory / 2**30
    scalars["time/rollout"], scalars["time/update"] = times
    if writer:
        for name, value in scalars.items():
            writer.add_scalar(name, value, global_step)
    shown = {"return": scalars["charts/episodic_return"], "SPS": scalars["charts/SPS"]}
    shown["explained variance"] = scalars["losses/explained_variance"]
    bar.set_postfix(shown, refresh=False)
    bar.update(num_steps)


def build(task, args: Args, device: torch.device):
    """The models of a team, checked: what can not work is refused here."""
    args.num_envs = args.num_envs or task.num_envs
    if args.total_env_steps is None:
        args.total_env_steps = task.total_env_steps
    args.num_turns = task.num_turns
    if args.num_generations == 1 and args.baseline != "none":
        raise UserError(f"--num-generations 1: must be at least 2 with --baseline {args.baseline}")
    divisor = args.num_generations * args.num_minibatches * world_size()
    if args.num_envs % divisor > 0:
        told = f"must be divisible by {divisor}, the product of minibatches, ranks and generations"
        raise UserError(f"--num-envs {args.num_envs}: {told}")
    torch.manual_seed(int(rng(args.seed, "initialisation").integers(2**32)))
    names = [args.model[i % len(args.model)] for i in range(args.num_agents)]
    frozen = {}  # weights that models of one name share
    agents = [Agent(i, name, args, device, frozen) for i, name in enumerate(names)]
    critics = []  # Monte Carlo has none
    limit = args.max_new_tokens or task.max_new_tokens
    check_lengths(task, [*agents, *critics], args.num_agents, limit)
    check_sampling(task, agents, args)
    return agents, critics


def main(args: Args) -> None:
    """Train, evaluate and save one team."""
    task = make(args.task, args.num_agents, args.num_turns, args.dataset, args.eval_dataset)
    device = join_ranks(args.device)
    agents, critics = build(task, args, device)
    models = [model for model in [*agents, *critics] if model.optimizer]
    iteration = global_step = 0
    if args.resume:
        with naming(f"--resume {args.resume}"):
            iteration, global_step = load_checkpoint(Path(args.resume), models, args)
    stop = stop_signal()  # Ctrl-C or SIGTERM: save after this iteration, and end
    run_dir, writer = open_run(args, global_step)
    if not args.resume:
        evaluate(task, agents, args, writer, global_step)
        save(run_dir, writer, agents, models, args, iteration, global_step)
    bar = tqdm(total=args.total_env_steps, initial=global_step, unit="step", disable=rank() > 0)
    last = global_step >= args.total_env_steps
    while not last:
        rollout_start = time.time()
        items = draw_items(task.train, args.num_envs // args.num_generations, args.seed, iteration)
        items = [item for item in items for _ in range(args.num_generations)]
        episodes = start_episodes(items, args.num_agents)
        rollout(task, episodes, agents, args, "rollout", iteration, critics)

        update_start = time.time()
        metrics = update(episodes, agents, critics, task.num_turns, args, iteration)
        times = update_start - rollout_start, time.time() - update_start
        if iteration == 0:
            check_gaps(agents, metrics["losses/sampling_gap"], args.dtype)

        episodes = gather(episodes)
        iteration += 1
        global_step += sum(len(e.rewards) for e in episodes)
        log_training(writer, bar, args, global_step, episodes, metrics, times)

        signals = all_sum(torch.tensor(len(stop), device=device)).item()
        last = global_step >= args.total_env_steps or signals > 0
        if last or (args.eval_every and iteration % args.eval_every == 0):
            evaluate(task, agents, args, writer, global_step)
        if last or (args.save_every and iteration % args.save_every == 0):
            save(run_dir, writer, agents, models, args, iteration, global_step)
    say(f"the agents are in {run_dir}/agent_0 to agent_{len(agents) - 1}, at step {global_step}")
    bar.close()
    if writer:
        writer.close()


def command_line(args_class, main) -> None:
    """Run main(args) on the flags of the command line; known errors end it with one line."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # no line for each retry
    try:
        main(parse_args(args_class))
    except (UserError, FloatingPointError, torch.OutOfMemoryError) as error:
        traceback.clear_frames(error.__traceback__)  # the run's objects end, its progress bar too
        tqdm.write("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)  # 2: a user can mend it


if __name__ == "__main__":
    command_line(Args, main)
