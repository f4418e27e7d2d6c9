# docs: docs/speed.md
"""Speed and memory of the scripts beside CoMLRL's and TRL's trainers: bash benchmark.sh speed

Both sides get the same model folder, prompts, reward and episodes, sample from the full softmax at
temperature 1, and give responses of the same length, counted on both sides (the peers can not
sample EOS; here it ends nothing). Later turns append a fixed line of feedback: here to the token
history, in CoMLRL to the text, which it encodes anew. One update for a batch of episodes; CoMLRL
makes one for each turn of it, and its CC steps the critic once for each agent. Every measurement is
a process of its own, ours and the peer's in turn. Memory is resident and includes all imports.

Utilisation: floating-point operations that the update needs (6 x parameters x tokens, 6 x layers x
width x S^2 for causal attention, LM head at response positions only; an o_0 counts once for all its
episodes, embeddings and padding do not count) in its time, over the rate of a large matrix product.
Padding: the share of the tokens computed that need not be, with default arguments: padding itself,
and an o_0 that is read again.
"""

import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib import import_module
from itertools import chain
from math import inf
from pathlib import Path
from statistics import median

import torch
import tyro
from transformers import AutoTokenizer, GenerationMixin

import envs

SCRIPTS = ("collm_cc", "collm_dc", "mc_baseline")
NUM_GENERATIONS = 4  # episodes of an item, in both libraries' MC
FEEDBACK = "Try again, in other words."
GIB = 2**30 if sys.platform == "darwin" else 2**20  # unit of ru_maxrss


@dataclass
class Args:
    comlrl: str = ""
    """Python that has comlrl==1.4.3; without it, its comparisons are left out"""
    trl: str = ""
    """Python that has trl==1.16.0; without it, its comparison is left out"""
    model: str = "models/tiny"
    """folder of a causal LM"""
    turns: tuple[int, ...] = (1, 4)
    """turns of an episode in the comparisons of CC and DC; the first also in those of MC"""
    episodes: tuple[int, ...] = (64, 16)
    """for each of `turns`, episodes of an iteration"""
    iterations: int = 2
    """iterations of a measurement"""
    max_new_tokens: int = 64
    """tokens of every response in the comparisons"""
    repeats: int = 3
    """measurements of each side of a comparison"""
    threads: int = os.cpu_count() or 1
    """threads of a process"""
    tasks: tuple[str, ...] = ("tldr", "arxiv", "coding", "strbuild", "housebuild")
    """tasks for padding"""
    scales: tuple[int, ...] = (16, 32, 64, 128)
    """numbers of episodes for time and memory of an iteration (CC, coding)"""


# =========================================== our side ===========================================
class Workload(envs.Task):
    """A task with given prompts in which nothing ends early: what both sides play."""

    name = "workload"
    success = inf

    def __init__(self, spec):
        self.prompts = spec["prompts"]
        super().__init__(spec["agents"], spec["turns"])
        self.max_new_tokens = spec["max_new_tokens"]

    def items(self):
        items = [{"prompts": pair[: self.num_agents]} for pair in self.prompts]
        return items, items[:1]

    def observe(self, item):
        return item["prompts"]

    def score(self, item, actions):
        return reward(*actions), {}

    def feedback(self, item, actions, info, turn):
        return [FEEDBACK] * len(actions)


def reward(first, second=""):
    """Any cheap function of the texts; only its cost matters, and that both sides have the same."""
    return -abs(len(second) / max(len(first), 1) - 2.0)


def needed_spans(tokens, turns):
    """(start, end) of all that has to be computed of histories.

    That is an o_0 but for its last token once, and the rest of each history.
    """
    starts = [marks.index(0) - 1 for marks in turns]
    shared = {tuple(ids[:start]) for ids, start in zip(tokens, starts)}
    spans = [(0, len(ids)) for ids in shared]
    return spans + [(start, len(ids)) for ids, start in zip(tokens, starts)]


def size(spans):
    """Tokens in spans."""
    return sum(end - start for start, end in spans)


def needed_flops(model, spans, responses):
    """Floating-point operations of one forward and backward.

    spans: (start, end) of sequences, each of which reads its sequence from 0 on.
    responses: tokens that need an LM head.
    """
    config = model.config.get_text_config()
    embedding = model.get_input_embeddings().weight
    body = sum(p.numel() for p in model.parameters()) - embedding.numel()
    head = model.get_output_embeddings() if responses else None
    if head is not None and head.weight is not embedding:
        body -= head.weight.numel()
    pairs = sum(end**2 - start**2 for start, end in spans)
    attention = config.num_hidden_layers * config.hidden_size * pairs
    logits = config.vocab_size * config.hidden_size * responses
    return 6 * (body * size(spans) + attention + logits)


def matmul_rate(n=2048):
    """Floating-point operations a second of a large float32 matrix product; the best of ten."""
    a = torch.randn(n, n)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times)


def peak_gib():
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / GIB


def count_computed(models):
    """[tokens that these models read], which grows with each forward."""
    computed = [0]

    def count(_, inputs, named):
        ids = inputs[0] if inputs else named["input_ids"]
        computed[0] += ids.numel()

    for model in models:
        model.register_forward_pre_hook(count, with_kwargs=True)
    return computed


def ours(spec):
    """Measure a script, with the functions and the arguments that it would use itself."""
    script = import_module(spec["script"])
    num_agents = spec["agents"]
    args = script.Args(model=[spec["model"]], num_agents=num_agents, num_envs=spec["episodes"])
    task = envs.make(spec["task"], num_agents) if spec.get("task") else Workload(spec)
    agents, critics = script.build(task, args, torch.device("cpu"))
    if not spec.get("task"):
        for agent in agents:
            agent.chat.eos = set()
    computed = count_computed([reader.model for reader in [*agents, *critics]])
    group = getattr(args, "num_generations", 1)
    out = {"rollout": [], "update": [], "steps": 0, "tokens": 0, "flops": 0, "needed": 0}
    for iteration in range(spec["iterations"]):
        items = script.draw_items(task.train, spec["episodes"] // group, args.seed, iteration)
        items = [item for item in items for _ in range(group)]
        episodes = [script.Episode.start(k, item, num_agents) for k, item in enumerate(items)]
        start = time.perf_counter()
        script.rollout(task, episodes, agents, args, "rollout", iteration)
        middle = time.perf_counter()
        script.update(episodes, agents, critics, task.num_turns, args, iteration)
        out["rollout"].append(middle - start)
        out["update"].append(time.perf_counter() - middle)
        out["steps"] += sum(len(e.rewards) for e in episodes)
        count_needed(out, episodes, agents, critics)
    out["memory"] = peak_gib()  # before the matrix product adds to it
    out["padding"] = 1 - out["needed"] / computed[0]
    out["utilisation"] = out["flops"] / sum(out["update"]) / matmul_rate()
    return out


def count_needed(out, episodes, agents, critics):
    """Add up response tokens, tokens that have to be computed, and operations of the update."""
    for i, agent in enumerate(agents):
        spans = needed_spans([e.tokens[i] for e in episodes], [e.turns[i] for e in episodes])
        responses = sum(turn >= 0 for e in episodes for turn in e.turns[i])
        out["tokens"] += responses
        # Rollout and update; a rollout does not read the last token of a history
        out["needed"] += 2 * size(spans) - len(episodes)
        out["flops"] += needed_flops(agent.model, spans, responses)
    for critic in critics:
        spans = [(0, len(critic.encode(e, len(e.rewards))[0])) for e in episodes]
        out["needed"] += size(spans)
        out["flops"] += needed_flops(critic.model, spans, 0)


# ============================================ peers =============================================
def timed(owner, name):
    """[seconds that a method of `owner` has taken], which grows with each call."""
    method = getattr(owner, name)
    spent = [0.0]

    def wrapper(*args, **named):
        start = time.perf_counter()
        try:
            return method(*args, **named)
        finally:
            spent[0] += time.perf_counter() - start

    setattr(owner, name, wrapper)
    return spent


def count_generated():
    """[tokens that any model has generated and that are no padding], which grows."""
    generate = GenerationMixin.generate
    total = [0]

    def wrapper(model, *args, **named):
        out = generate(model, *args, **named)
        sequences = out if hasattr(out, "shape") else out.sequences
        new = sequences[:, named["input_ids"].shape[1] :]
        total[0] += int((new != model.config.pad_token_id).sum())
        return out

    GenerationMixin.generate = wrapper
    return total


def peer(spec):
    """Measure a peer's own trainer."""
    os.environ["WANDB_MODE"] = "disabled"
    tokens = count_generated()
    if spec["side"] == "comlrl":
        trainer = make_comlrl(spec)
        spent = timed(trainer, "_process_buffer")  # its update
    else:
        trainer = make_trl(spec)
        spent = timed(trainer, "_generate_and_score_completions")  # its rollout
    start = time.perf_counter()
    trainer.train()
    wall = time.perf_counter() - start
    if spec["side"] == "comlrl":
        rollout, steps = wall - spent[0], trainer.env_step
    else:
        rollout, steps = spent[0], spec["episodes"] * spec["iterations"]
    out = {"rollout": [rollout], "update": [wall - rollout]}
    return out | {"steps": steps, "tokens": tokens[0], "memory": peak_gib()}


def make_comlrl(spec):
    """CoMLRL's trainer of the same method."""
    from comlrl.trainers.actor_critic import IACConfig, IACTrainer, MAACConfig, MAACTrainer
    from comlrl.trainers.reinforce import MAGRPOConfig, MAGRPOTrainer
    from datasets import Dataset

    n = spec["agents"]
    group = NUM_GENERATIONS if spec["script"] == "mc_baseline" else 1
    rows = []
    for k, pair in enumerate(spec["prompts"]):
        rows.append({"prompt": str(k)} | {f"agent_{i}": pair[i] + "\n" for i in range(n)})

    def transition(prompt_history_per_agent, response_history_per_agent, **_):
        histories = zip(prompt_history_per_agent, response_history_per_agent)
        return [prompts[-1] + texts[-1] + f"\n{FEEDBACK}\n" for prompts, texts in histories]

    def formatter(i):
        return lambda row, external_prompts=None: external_prompts or row[f"agent_{i}"]

    batch = spec["episodes"] // group * spec["turns"]  # of an agent's buffer after an iteration
    options = {
        "num_agents": n,
        "num_turns": spec["turns"],
        "num_generations": group,
        "max_new_tokens": spec["max_new_tokens"],
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "num_train_epochs": 1,
        "rollout_buffer_size": batch,
        "train_batch_size": batch,
        "eval_interval": 0,
        "early_termination_threshold": None,
        "agent_devices": "cpu",
        "external_prompt_passthrough": True,
    }
    named = {
        "agent_model": spec["model"],
        "tokenizer": AutoTokenizer.from_pretrained(spec["model"]),
        "reward_func": lambda *texts: [reward(*each) for each in zip(*texts)],
        "formatters": [formatter(i) for i in range(n)],
        "train_dataset": Dataset.from_list(rows),
        "external_transition": transition,
    }
    if spec["script"] == "mc_baseline":
        return MAGRPOTrainer(num_agents=n, args=MAGRPOConfig(**options), **named)
    options["critic_devices"] = "cpu"
    if spec["script"] == "collm_cc":
        return MAACTrainer(critic_model=spec["model"], args=MAACConfig(**options), **named)
    return IACTrainer(critics=[spec["model"]] * n, args=IACConfig(**options), **named)


def make_trl(spec):
    """TRL's GRPOTrainer: one agent, one turn."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=spec["episodes"],
        num_generations=NUM_GENERATIONS,
        beta=0.0,
        max_completion_length=spec["max_new_tokens"],
        max_steps=spec["iterations"],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    return GRPOTrainer(
        model=spec["model"],
        args=config,
        train_dataset=Dataset.from_list([{"prompt": pair[0] + "\n"} for pair in spec["prompts"]]),
        reward_funcs=lambda completions, **_: [reward(text) for text in completions],
    )


# ========================================= measurements =========================================
def measure(spec, python=sys.executable):
    """Result of one measurement in a process of its own."""
    env = os.environ | {
        "OMP_NUM_THREADS": str(spec["threads"]),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [python, str(Path(__file__).resolve()), "worker"]
    run = subprocess.run(command, input=json.dumps(spec), env=env, capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"{spec['side']} {spec['script']}: it failed:\n{run.stderr[-3000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def copy_model(source, folder):
    """A copy that both sides read as plain text, whose generate() never samples EOS or padding."""
    shutil.copytree(source, folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("chat_template", None)
    path.write_text(json.dumps(config))
    path = folder / "generation_config.json"
    known = path if path.exists() else folder / "config.json"
    config = json.loads(known.read_text())
    eos = config["eos_token_id"]
    stops = {*(eos if isinstance(eos, list) else [eos]), config.get("pad_token_id")} - {None}
    path.write_text(json.dumps(config | {"suppress_tokens": sorted(stops)}))
    return str(folder)


def make_prompts(n):
    """n pairs of prompts about one post of 60 to 140 words: 88 to 241 tokens of models/tiny."""
    rng = random.Random(0)
    words = "a train leaves the quiet station while people wait for rain and talk over tea".split()
    pairs = []
    for _ in range(n):
        post = " ".join(rng.choices(words, k=rng.randint(60, 140)))
        pairs.append([f"Sum up: {post}", f"Say more: {post}"])
    return pairs


def table(header, rows):
    """Print a Markdown table, each row as soon as there is one: a failure costs those to come."""
    for row in chain([header, ["---"] * len(header)], rows):
        cells = [f"{x:.3g}" if isinstance(x, float) else str(x) for x in row]
        print("| " + " | ".join(cells) + " |", flush=True)
    print()


def rate(result):
    """Joint actions a second."""
    return result["steps"] / (sum(result["rollout"]) + sum(result["update"]))


def check_equal_work(a, b, what):
    """End the benchmark if two results are of different numbers of steps or tokens."""
    if (a["steps"], a["tokens"]) != (b["steps"], b["tokens"]):
        told = f"{a['steps'], a['tokens']}, {b['steps'], b['tokens']}"
        raise SystemExit(f"{what}: unequal work: {told}")


def compare_case(spec, python, args):
    """A row of the first table: both sides of one comparison, in turn."""
    a, b = [], []
    for _ in range(args.repeats):
        a.append(measure(spec | {"side": "ours"}))
        b.append(measure(spec, python))
        check_equal_work(a[-1], b[-1], f"{spec['side']} {spec['script']}")
    ratios = [rate(x) / rate(y) for x, y in zip(a, b)]

    def both(value, factor=1.0):
        ours, theirs = (median(value(x) for x in side) * factor for side in (a, b))
        return f"{ours:.2f} / {theirs:.2f}"

    row = [f"{spec['script']}.py", spec["side"], spec["agents"], spec["turns"], spec["episodes"]]
    row += [a[0]["tokens"], both(rate)]
    row.append(f"{median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})")
    row.append(both(lambda x: sum(x["rollout"]), 1 / args.iterations))
    row.append(both(lambda x: sum(x["update"]), 1 / args.iterations))
    row.append(both(lambda x: x["memory"]))
    row.append(f"{median(x['utilisation'] for x in a):.0%}")
    return row


def compare(base, args):
    """Rows of the first table."""
    sizes = list(zip(args.turns, args.episodes, strict=True))
    cases = [("comlrl", script, 2, *size) for script in SCRIPTS[:2] for size in sizes]
    cases += [("comlrl", "mc_baseline", 2, *sizes[0]), ("trl", "mc_baseline", 1, *sizes[0])]
    for side, script, agents, turns, episodes in cases:
        python = {"comlrl": args.comlrl, "trl": args.trl}[side]
        if not python:
            continue
        spec = base | {"side": side, "script": script, "agents": agents}
        spec |= {"turns": turns, "episodes": episodes}
        group = NUM_GENERATIONS if script == "mc_baseline" else 1
        # Both sides use each prompt once
        spec["prompts"] = base["prompts"][: episodes // group * args.iterations]
        yield compare_case(spec, python, args)


def padding(base, args):
    """Rows of the second table: each task with its own arguments."""
    for task in args.tasks:
        spec = base | {"task": task, "episodes": envs.make(task).num_envs}
        row = [task]
        for script in SCRIPTS:
            result = measure(spec | {"script": script})
            row.append(f"{result['padding']:.1%}, {result['utilisation']:.0%}")
        yield row


def scaling(base, args):
    """Rows of the third table: iterations of more and more episodes."""
    for episodes in args.scales:
        result = measure(base | {"script": "collm_cc", "task": "coding", "episodes": episodes})
        seconds = [min(result["rollout"]), min(result["update"])]
        yield [episodes, *seconds, 1000 * sum(seconds) / episodes, result["memory"]]


# ============================================= main =============================================
def main(args):
    """Print three tables: comparisons, padding, scaling."""
    with tempfile.TemporaryDirectory() as folder:
        base = {
            "side": "ours",
            "model": copy_model(args.model, Path(folder, "model")),
            "agents": 2,
            "turns": 1,
            "threads": args.threads,
            "iterations": args.iterations,
            "max_new_tokens": args.max_new_tokens,
            "prompts": make_prompts(max(args.episodes) * args.iterations),
        }
        print(f"{args.model}, {args.threads} threads, responses of {args.max_new_tokens} tokens,")
        print(f"{args.iterations} iterations, {args.repeats} repeats. Seconds: of an iteration.\n")
        header = ["script", "peer", "agents", "turns", "episodes", "response tokens, each side"]
        header += ["env steps/s, ours / peer", "ratio, median (range)", "rollout s", "update s"]
        table([*header, "peak GiB", "utilisation of our update"], compare(base, args))
        real = base | {"model": args.model, "prompts": []}
        table(["padding, utilisation", *SCRIPTS], padding(real, args))
        header = ["episodes (CC, coding)", "rollout s", "update s", "ms an episode", "peak GiB"]
        table(header, scaling(real, args))


def worker():
    """Read the spec of a measurement, print its result."""
    spec = json.load(sys.stdin)
    random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(spec["threads"])
    result = ours(spec) if spec["side"] == "ours" else peer(spec)
    print(json.dumps(result))


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker()
    else:
        main(tyro.cli(Args))
