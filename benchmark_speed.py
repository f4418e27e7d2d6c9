# docs: README.md#benchmarksh
"""Speed and memory of the scripts beside CoMLRL's and TRL's trainers; `bash benchmark.sh speed` runs it.

The same model folder, prompts, reward, episodes, sampling from the full softmax at temperature 1, and length of every
response, counted on both sides (the peers can not sample EOS; here it ends nothing). Later turns append a fixed line of
feedback: here to the token history, in CoMLRL to the text, which it encodes anew. One update for a batch of episodes;
CoMLRL makes one for each turn of it, and CC steps its critic once for each agent. Every measurement is a process of its
own, ours and the peer's in turn. Memory is resident and includes all imports.

Utilisation: floating-point operations that the update needs (6 x parameters x tokens, 6 x layers x width x S^2 for
causal attention, LM head at response positions only; an o_0 counts once for all its episodes, embeddings and padding
do not count) in its time, over the rate of a large matrix product. Padding: share of the tokens computed in rollout and
update, default arguments.
"""

import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib import import_module
from itertools import chain, product
from pathlib import Path

SCRIPTS = ("collm_cc", "collm_dc", "mc_baseline")
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
    """for each of `turns`, episodes of an iteration: the scripts' own for tasks of one turn, and of four"""
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
    rollout_batches: tuple[int, ...] = (64, 16)
    """for each of these, episodes that are played at once in those"""


# ================================================== our side ==================================================
class Workload:
    """A task with given prompts in which nothing ends early: what both sides play."""

    reward_shift, success, sparse, parallel, reward_time = 0.0, float("inf"), 0.0, False, 0.0

    def __init__(self, spec):
        self.num_turns, self.max_new_tokens = spec["turns"], spec["max_new_tokens"]

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
    """(start, end) of all that has to be computed of histories: an o_0, less its last token, once; the rest of each."""
    starts = [t.index(0) - 1 for t in turns]
    shared = {tuple(x[:start]) for x, start in zip(tokens, starts)}
    return [(0, len(x)) for x in shared] + [(start, len(x)) for x, start in zip(tokens, starts)]


def needed_flops(model, spans, responses):
    """Floating-point operations of one forward and backward of spans (start, end) of sequences, each of which reads its
    sequence from 0 on; responses: tokens that need an LM head."""
    config = model.config.get_text_config()
    body = sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()
    head = model.get_output_embeddings() if responses else None
    if head is not None and head.weight is not model.get_input_embeddings().weight:
        body -= head.weight.numel()
    attention = 6 * config.num_hidden_layers * config.hidden_size * sum(end**2 - start**2 for start, end in spans)
    return (
        6 * body * sum(end - start for start, end in spans)
        + attention
        + 6 * config.vocab_size * config.hidden_size * responses
    )


def matmul_rate(n=2048):
    """Floating-point operations a second of a large float32 matrix product; the best of ten."""
    import torch

    a, times = torch.randn(n, n), []
    for _ in range(10):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times)


def ours(spec):
    """Measure rollout and update of a script, with the functions and the arguments that it would use itself."""
    import torch

    import envs

    script, device = import_module(spec["script"]), torch.device("cpu")
    n, single = spec["agents"], spec["script"] == "mc_baseline"
    args = script.Args(model=[spec["model"]], num_agents=n, num_envs=spec["episodes"], num_minibatches=1)
    args.rollout_batch = spec.get("rollout_batch", args.rollout_batch)
    args.max_new_tokens = None if spec.get("task") else spec["max_new_tokens"]
    task = envs.make(spec["task"], n) if spec.get("task") else Workload(spec)
    agents = [script.Agent(spec["model"], args, device) for _ in range(n)]
    reads = {"collm_cc": [list(range(n))], "collm_dc": [[i] for i in range(n)], "mc_baseline": []}[spec["script"]]
    critics = [script.Critic(spec["model"], each, args, device) for each in reads]
    tokens = {"computed": 0, "real": 0}

    def count(_, inputs, named):
        ids = inputs[0] if inputs else named["input_ids"]
        tokens["computed"] += ids.numel()
        mask = named.get("attention_mask")
        if mask is not None and mask.ndim == 2:  # of a rollout; what is real in an update is added below
            tokens["real"] += int(mask[:, -ids.shape[1] :].sum())

    def pack(histories, turns, model, packed=envs.pack):
        tokens["real"] += sum(end - start for start, end in needed_spans(histories, turns))
        return packed(histories, turns, model)

    if spec.get("task"):
        envs.pack = pack
        for model in [agent.model for agent in agents] + [critic.body for critic in critics]:
            model.register_forward_pre_hook(count, with_kwargs=True)
    else:
        for agent in agents:
            agent.eos = set()
    group = args.num_generations if single else 1
    out = {"rollout": [], "update": [], "steps": 0, "tokens": 0, "flops": 0}
    for iteration in range(spec["iterations"]):
        generator = torch.Generator().manual_seed(iteration)
        pool = task.train if spec.get("task") else [{"prompts": x[:n]} for x in spec["prompts"]]
        items = [x for x in envs.sample(pool, spec["episodes"] // group, 1, iteration) for _ in range(group)]
        start = time.perf_counter()
        episodes = [e for xs in envs.parts(items, args) for e in script.rollout(task, xs, agents, args, generator)]
        middle = time.perf_counter()
        script.update(episodes, agents, *([] if single else [critics]), task.num_turns, args, iteration)
        out["rollout"].append(middle - start)
        out["update"].append(time.perf_counter() - middle)
        out["steps"] += sum(len(e.rewards) for e in episodes)
        for i, agent in enumerate(agents):
            spans = needed_spans([e.tokens[i] for e in episodes], [e.turns[i] for e in episodes])
            responses = sum(t >= 0 for e in episodes for t in e.turns[i])
            out["tokens"] += responses
            out["flops"] += needed_flops(agent.model, spans, responses)
        for critic in critics:
            lengths = [len(critic.encode(e)[0]) for e in episodes]
            tokens["real"] += sum(lengths)
            out["flops"] += needed_flops(critic.body, [(0, n) for n in lengths], 0)
    padding = 1 - tokens["real"] / tokens["computed"] if spec.get("task") else None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / GIB  # before the matrix product adds to it
    return out | {"padding": padding, "memory": peak, "utilisation": out["flops"] / sum(out["update"]) / matmul_rate()}


# ==================================================== peers ===================================================
def timed(owner, name, spent):
    """Add up in spent[0] how long the method takes."""
    method = getattr(owner, name)

    def wrapper(*args, **named):
        start = time.perf_counter()
        try:
            return method(*args, **named)
        finally:
            spent[0] += time.perf_counter() - start

    setattr(owner, name, wrapper)


def count_tokens(total):
    """Add up in total[0] the tokens that any model generates and that are no padding."""
    from transformers import GenerationMixin

    generate = GenerationMixin.generate

    def wrapper(model, *args, **named):
        out = generate(model, *args, **named)
        sequences = out if hasattr(out, "shape") else out.sequences
        new = sequences[:, named["input_ids"].shape[1] :]
        total[0] += int((new != model.config.pad_token_id).sum())
        return out

    GenerationMixin.generate = wrapper


def peer(spec):
    """Measure a peer's own trainer."""
    os.environ["WANDB_MODE"] = "disabled"
    spent, tokens = [0.0], [0]
    count_tokens(tokens)
    trainer = (make_comlrl if spec["side"] == "comlrl" else make_trl)(spec)
    timed(trainer, "_process_buffer" if spec["side"] == "comlrl" else "_generate_and_score_completions", spent)
    start = time.perf_counter()
    trainer.train()
    wall = time.perf_counter() - start
    rollout = wall - spent[0] if spec["side"] == "comlrl" else spent[0]
    steps = trainer.env_step if spec["side"] == "comlrl" else spec["episodes"] * spec["iterations"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / GIB
    return {"rollout": [rollout], "update": [wall - rollout], "steps": steps, "tokens": tokens[0], "memory": peak}


def make_comlrl(spec):
    """CoMLRL's trainer of the same method."""
    from comlrl.trainers.actor_critic import IACConfig, IACTrainer, MAACConfig, MAACTrainer
    from comlrl.trainers.reinforce import MAGRPOConfig, MAGRPOTrainer
    from datasets import Dataset
    from transformers import AutoTokenizer

    n, k = spec["agents"], 4 if spec["script"] == "mc_baseline" else 1
    rows = [{"prompt": str(j)} | {f"agent_{i}": x[i] + "\n" for i in range(n)} for j, x in enumerate(spec["prompts"])]
    batch = spec["episodes"] // k * spec["turns"]  # what an agent's buffer holds after an iteration

    def transition(prompt_history_per_agent, response_history_per_agent, **_):
        return [p[-1] + r[-1] + f"\n{FEEDBACK}\n" for p, r in zip(prompt_history_per_agent, response_history_per_agent)]

    options = {
        "num_agents": n, "num_turns": spec["turns"], "num_generations": k, "max_new_tokens": spec["max_new_tokens"],
        "temperature": 1.0, "top_p": 1.0, "top_k": 0, "num_train_epochs": 1, "rollout_buffer_size": batch,
        "train_batch_size": batch, "eval_interval": 0, "early_termination_threshold": None, "agent_devices": "cpu",
        "external_prompt_passthrough": True,
    }  # fmt: skip
    named = {
        "agent_model": spec["model"],
        "tokenizer": AutoTokenizer.from_pretrained(spec["model"]),
        "reward_func": lambda *texts: [reward(*each) for each in zip(*texts)],
        "formatters": [lambda row, external_prompts=None, i=i: external_prompts or row[f"agent_{i}"] for i in range(n)],
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
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=spec["episodes"], num_generations=4, beta=0.0,
        max_completion_length=spec["max_new_tokens"], max_steps=spec["iterations"], use_cpu=True, bf16=False,
        gradient_checkpointing=False, report_to=[], save_strategy="no", temperature=1.0, top_p=1.0, top_k=0,
        dataloader_pin_memory=False, disable_tqdm=True,
    )  # fmt: skip
    return GRPOTrainer(
        model=spec["model"],
        args=config,
        train_dataset=Dataset.from_list([{"prompt": x[0] + "\n"} for x in spec["prompts"]]),
        reward_funcs=lambda completions, **_: [reward(x) for x in completions],
    )


# ==================================================== main ====================================================
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
    """A copy that both sides read as plain text and whose generate() never samples EOS or padding."""
    shutil.copytree(source, folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    path = folder / "generation_config.json"
    config = json.loads(path.read_text()) if path.exists() else json.loads((folder / "config.json").read_text())
    eos = config["eos_token_id"]
    stops = {*(eos if isinstance(eos, list) else [eos]), config.get("pad_token_id")} - {None}
    path.write_text(json.dumps(config | {"suppress_tokens": sorted(stops)}))
    return str(folder)


def make_prompts(n):
    """n pairs of prompts about one post of 60 to 140 words, which are 88 to 241 tokens of models/tiny."""
    rng, words = (
        random.Random(0),
        "a train leaves the quiet station while people wait for rain and talk over tea".split(),
    )
    posts = [" ".join(rng.choices(words, k=rng.randint(60, 140))) for _ in range(n)]
    return [[f"Sum up: {post}", f"Say more: {post}"] for post in posts]


def table(header, rows):
    """Print a Markdown table, each row as soon as there is one: a failure costs those to come."""
    for row in chain([header, ["---"] * len(header)], rows):
        print("| " + " | ".join(f"{x:.3g}" if isinstance(x, float) else str(x) for x in row) + " |", flush=True)
    print()


def compare(base, args):
    """Rows of the first table: both sides of every comparison, in turn."""
    sizes = list(zip(args.turns, args.episodes, strict=True))
    cases = [("comlrl", script, 2, *size) for script in SCRIPTS[:2] for size in sizes]
    cases += [("comlrl", "mc_baseline", 2, *sizes[0]), ("trl", "mc_baseline", 1, *sizes[0])]
    for side, script, agents, turns, episodes in cases:
        python = {"comlrl": args.comlrl, "trl": args.trl}[side]
        if not python:
            continue
        spec = base | {"script": script, "agents": agents, "turns": turns, "episodes": episodes}
        group = 4 if script == "mc_baseline" else 1
        spec["prompts"] = base["prompts"][: episodes // group * args.iterations]  # both sides use each of them once
        pairs = [
            (measure(spec | {"side": "ours"}), measure(spec | {"side": side}, python)) for _ in range(args.repeats)
        ]
        for a, b in pairs:
            if (a["steps"], a["tokens"]) != (b["steps"], b["tokens"]):
                raise SystemExit(f"{side} {script}: unequal work: {a['steps'], a['tokens']}, {b['steps'], b['tokens']}")
        rates = [[x["steps"] / (sum(x["rollout"]) + sum(x["update"])) for x in pair] for pair in pairs]
        ratios = [ours / theirs for ours, theirs in rates]
        middle = [[statistics.median(f(x) for x in column) for column in zip(*pairs)] for f in (
            lambda x: sum(x["rollout"]) / args.iterations,
            lambda x: sum(x["update"]) / args.iterations,
            lambda x: x["memory"],
        )]  # fmt: skip
        cells = [f"{ours:.2f} / {theirs:.2f}" for ours, theirs in middle]
        rate = " / ".join(f"{statistics.median(column):.2f}" for column in zip(*rates))
        ratio = f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"
        use = statistics.median(a["utilisation"] for a, _ in pairs)
        size = [agents, turns, episodes, pairs[0][0]["tokens"]]
        yield [f"{script}.py", side, *size, rate, ratio, *cells, f"{use:.0%}"]


def padding(base, args):
    """Rows of the second table: each task with its own arguments."""
    for task in args.tasks:
        spec = base | {"task": task, "episodes": import_module("envs").TASKS[task].num_envs}
        runs = [measure(spec | {"script": script}) for script in SCRIPTS]
        yield [task, *(f"{x['padding']:.1%}, {x['utilisation']:.0%}" for x in runs)]


def scaling(base, args):
    """Rows of the third table: iterations of more and more episodes."""
    for batch, episodes in product(args.rollout_batches, args.scales):
        spec = base | {"script": "collm_cc", "task": "coding", "episodes": episodes, "rollout_batch": batch}
        x = measure(spec)
        seconds = [min(x["rollout"]), min(x["update"])]
        yield [batch, episodes, *seconds, 1000 * sum(seconds) / episodes, x["memory"]]


def main(args):
    """Print three tables: comparisons, padding, scaling."""
    with tempfile.TemporaryDirectory() as folder:
        base = {
            "side": "ours", "model": copy_model(args.model, Path(folder, "model")), "turns": 1, "threads": args.threads,
            "prompts": make_prompts(max(args.episodes) * args.iterations), "agents": 2, "iterations": args.iterations,
            "max_new_tokens": args.max_new_tokens,
        }  # fmt: skip
        print(f"{args.model}, {args.threads} threads, {args.iterations} iterations, {args.repeats} repeats,")
        print(f"responses of {args.max_new_tokens} tokens. Seconds are of an iteration.\n")
        header = ["script", "peer", "agents", "turns", "episodes", "response tokens, each side"]
        header += ["env steps/s, ours / peer", "ratio, median (range)", "rollout s", "update s", "peak GiB"]
        table([*header, "utilisation of our update"], compare(base, args))
        real = base | {"model": args.model, "prompts": []}
        table(["padding of all tokens, utilisation", *SCRIPTS], padding(real, args))
        header = ["rollout_batch", "episodes (CC, coding)", "rollout s", "update s", "ms an episode", "peak GiB"]
        table(header, scaling(real, args))


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        request = json.load(sys.stdin)
        random.seed(0)
        import_module("torch").manual_seed(0)
        import_module("torch").set_num_threads(request["threads"])
        print(json.dumps((ours if request["side"] == "ours" else peer)(request)))
    else:
        main(import_module("tyro").cli(Args))
