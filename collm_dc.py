# docs: README.md#collm_dcpy
"""CoLLM-DC: multi-agent actor-critic with decentralized critics, for teams of language models (arXiv 2601.21972).

Agent i answers its own history h_it with a whole text a_it; all agents get one reward r_t. Critic V_i(h_it) reads the
history of agent i alone, in training only: its TD error is agent i's advantage. Execution needs only the agents.
Unlike in the paper, an episode is one growing token sequence per agent (one forward and one KV cache for all turns),
and actions are sampled from the very distribution that is trained. The defaults suit models/tiny on two CPU cores.

CPU:      python SCRIPT.py --task coding --seed 1
one GPU:  python SCRIPT.py --model Qwen/Qwen2.5-Coder-0.5B-Instruct --actor-lr 5e-6 --critic-lr 5e-6 --dtype bfloat16
GPUs:     torchrun --nproc-per-node=8 SCRIPT.py with the same flags: each iteration's episodes are split over them
"""
# Shapes: B episodes (of an update: of a minibatch), N agents, T turns, S tokens of a sequence, R tokens of a response,
# V vocabulary, D width, b episodes of a microbatch, p rows that a forward reads, n response tokens, k rows decoding.

import time
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModel, AutoModelForCausalLM, Cache, DynamicLayer

import envs


# ===================================================== Args =====================================================
@dataclass
class Args:
    exp_name: str = Path(__file__).stem
    """name of the experiment"""
    seed: int = 1
    """seed of initialisation, item order and sampling"""
    task: str = "coding"
    """tldr, arxiv, coding, strbuild or housebuild (envs.TASKS)"""
    dataset: str | None = None
    """items instead of the embedded ones: a JSON or JSONL file, `humaneval` (coding), or a Hub id"""
    model: list[str] = field(default_factory=lambda: ["models/tiny"])
    """Hub id or folder of a causal LM: one for all agents, or one for each"""
    num_agents: int = 2
    """agents in the team (N); 1 is the single-agent special case"""
    num_turns: int | None = None
    """turns of an episode (T); the task's own by default"""
    feedback: str | None = None
    """what a game tells after a turn: position, score or perfect; the task's own by default"""
    sparse: float = 0.0
    """pay the largest reward for a score of this many % or more, else 0 (before reward_shift); 0: as the task pays"""
    total_env_steps: int = 2048
    """joint actions to train for"""
    num_envs: int | None = None
    """episodes of an iteration (B); the task's own by default"""
    rollout_batch: int = 64
    """episodes that are played at once, at most num_envs: bounds the memory of the KV caches"""
    num_minibatches: int = 1
    """gradient steps per iteration, each on num_envs / num_minibatches whole episodes; 1: strictly on policy"""
    microbatch_tokens: int = 2048
    """tokens, padding included, of one forward/backward in the update: bounds memory, changes only rounding"""
    max_new_tokens: int | None = None
    """longest response (R); the task's own by default"""
    temperature: float = 1.0
    """of sampling, and of the log-probabilities that are trained"""
    gamma: float = 0.9
    """discount from one turn to the next"""
    gae_lambda: float = 0.0
    """lambda of GAE over turns; 0 is the paper's one-step TD error; with critic_type q it is of the target only"""
    actor_lr: float = 3e-4
    """learning rate of the agents"""
    critic_lr: float = 1e-3
    """learning rate of the critic"""
    vf_coef: float = 0.6
    """coefficient of the value loss; scales the critic's gradient before clipping"""
    norm_adv: bool = True
    """normalise advantages for each agent, over the turns that a minibatch played (its live turns)"""
    max_grad_norm: float = 1.0
    """largest gradient norm of each model"""
    kl_coef: float = 0.0
    """coefficient of KL(pi || reference) over a response; the reference is the model that training starts from"""
    critic_type: Literal["v", "q"] = "v"
    """v: V(h_t), advantage = TD error; q: Q(h_t, a_t), read after the actions, advantage = Q"""
    reward_shift: float | None = None
    """added to every raw reward; the task's own by default"""
    eval_every: int = 10
    """iterations between evaluations on held-out items; 0: only at the start and the end"""
    eval_episodes: int = 128
    """most episodes of an evaluation: eval_samples of each of the first held-out items"""
    eval_samples: int = 4
    """episodes of each held-out item in an evaluation, for pass@k"""
    save_every: int = 25
    """iterations between checkpoints; 0: only at the start and the end"""
    resume: str | None = None
    """run folder to go on with, e.g. runs/NAME"""
    run_name: str | None = None
    """name of the run's folder in runs/; {task}__{exp_name}__{seed}__{unix time} by default"""
    track: bool = False
    """also log to Weights & Biases"""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto is cuda if there is one"""
    agent_devices: list[str] = field(default_factory=list)
    """devices that agents, then critics, get in turn, as cuda:0 cuda:1: agents act in parallel; --device by default"""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """arithmetic of the models; bfloat16 is autocast over float32 weights"""
    lora_rank: int = 0
    """rank of LoRA adapters (peft); the weights stay frozen, and models of one name share them; 0: train all weights"""
    gradient_checkpointing: bool = False
    """keep only the inputs of layers for the backward pass: saves memory, costs one more forward"""


# ================================================= model helpers =================================================
class Agent(nn.Module):
    """One policy pi_i: a causal LM, its tokenizer, its optimizer, and how its chat frames the turns of an episode."""

    def __init__(self, name: str, args: Args, device: torch.device):
        super().__init__()
        self.model, self.tokenizer = envs.load_model(AutoModelForCausalLM, name, args, device)
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=args.actor_lr, weight_decay=0.0, fused=True)
        if args.kl_coef:  # the reference: this model without its adapters, or a second one, which never learns
            reference = self.model if args.lora_rank else envs.load_model(AutoModelForCausalLM, name, args, device)[0]
            self.reference = SimpleNamespace(model=reference)  # so that it is no submodule: not trained, not saved
        config = self.model.generation_config
        config.do_sample, eos = True, config.eos_token_id  # without do_sample, some configs fail to save
        self.eos = {*(eos if isinstance(eos, list) else [eos]), self.tokenizer.eos_token_id} - {None}
        # What stands around the user's text in the first and in later turns; plain text if there is no chat template
        self.first, self.later = ("", "\n"), ("\n", "\n")
        if self.tokenizer.chat_template:
            user, reply = {"role": "user", "content": "<USER>"}, {"role": "assistant", "content": "<REPLY>"}
            chats, options = [[user], [user, reply, user]], {"add_generation_prompt": True, "enable_thinking": False}
            first, later = self.tokenizer.apply_chat_template(chats, tokenize=False, **options)
            self.first, self.later = first.split("<USER>"), later.split("<REPLY>")[1].split("<USER>")

    def frame(self, observation: str, history: list[int]) -> list[int]:
        """The tokens that an observation appends to a history; what is in the history stays as it is."""
        before, after = self.later if history else self.first
        bos = not history and not self.tokenizer.chat_template  # a template writes its own
        tokens = self.tokenizer(before + observation + after, add_special_tokens=bos)["input_ids"]
        return tokens[1:] if history and {history[-1], tokens[0]} <= self.eos else tokens  # no second EOS


class Critic(nn.Module):
    """A transformer body and a linear value head; `reads` lists the agents whose histories it reads."""

    def __init__(self, name: str, reads: list[int], args: Args, device: torch.device):
        super().__init__()
        self.body, self.tokenizer = envs.load_model(AutoModel, name, args, device)
        self.head = nn.Linear(self.body.config.get_text_config().hidden_size, 1, dtype=self.body.dtype, device=device)
        nn.init.zeros_(self.head.weight)
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=args.critic_lr, weight_decay=0.0, fused=True)
        self.reads, self.critic_type = reads, args.critic_type

    def encode(self, episode: "Episode") -> tuple[list[int], list[int]]:
        """Tokens that the critic reads of an episode and, for each turn t, the index in them at which V(h_t) is read.
        Block 0 is o_0 of all that it reads, block t their (a_{t-1}, o_t); for Q(h_t, a_t), block t is (o_t, a_t)."""
        tokens, ends = [], []
        for t in range(len(episode.rewards)):
            turn = slice(max(0, 2 * t - 1), 2 * t + 1) if self.critic_type == "v" else slice(2 * t, 2 * t + 2)
            block = "\n\n".join("\n".join([f"[Agent {i}]", *episode.texts[i][turn]]) for i in self.reads)
            tokens += self.tokenizer("\n\n" * (t > 0) + block, add_special_tokens=t == 0)["input_ids"]
            ends.append(len(tokens) - 1)
        if len(tokens) > envs.max_length(self.body):
            raise envs.UserError(f"critic of agents {self.reads}: a history of {len(tokens)} tokens is too long for it")
        return tokens, ends

    def forward(self, tokens: list[list[int]], ends: list[list[int]], num_turns: int) -> torch.Tensor:
        """V of b sequences at the indices `ends`, from one forward: (T, b); at dead turns it means nothing."""
        ids = pad_sequence([torch.tensor(x) for x in tokens], batch_first=True).to(self.body.device)  # (b, S)
        at = torch.tensor([x + [0] * (num_turns - len(x)) for x in ends], device=ids.device).T  # (T, b)
        hidden = self.body(input_ids=ids, use_cache=False).last_hidden_state  # (b, S, D); causal, so pads are not seen
        hidden = hidden[torch.arange(len(ids), device=ids.device), at]  # (T, b, D)
        return self.head(hidden.to(self.head.weight.dtype)).squeeze(-1)  # (T, b)


def optimize(name: str, model: nn.Module, max_grad_norm: float) -> torch.Tensor:
    """Sum the gradient over ranks, clip it, step. Gives its norm before clipping, (); raises if that is not finite."""
    envs.all_sum(*(p.grad for p in model.parameters() if p.grad is not None))
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    if not norm.isfinite():
        raise FloatingPointError(f"{name}: the gradient norm is {norm}")
    model.optimizer.step()
    model.optimizer.zero_grad()
    return norm


# =================================================== generate ===================================================
class RowsLayer(DynamicLayer):
    """Keys and values of a layer, (2, B, heads, columns, width), of which a forward of k rows writes the first k."""

    def update(self, keys, values, *args, **kwargs):  # in place; autocast leaves keys float32, but attends in bfloat16
        new, start = torch.stack([keys.to(values.dtype), values]), self.get_seq_length()  # (2, k, heads, new, width)
        k, end = new.shape[1], start + new.shape[3]
        if not self.is_initialized:
            self.buffer, self.is_initialized = new, True
        rows, columns = self.buffer.shape[1], self.buffer.shape[3]
        if k > rows or end > columns:  # 64 more columns than needed, so that decoding seldom copies the past
            self.buffer = F.pad(self.buffer, (0, 0, 0, max(0, end + 64 - columns), 0, 0, 0, max(0, k - rows)))
        self.buffer[:, :k, :, start:end] = new
        self.keys, self.values = self.buffer[:, :k, :, :end]
        return self.keys, self.values


class RowsCache(Cache):
    """KV cache of the episodes being played: episode j has row place[j]; mask (B, columns) is 0 where no token is."""

    mask = place = None  # (B, columns), (B,)

    def select(self, rows: torch.Tensor, columns: int | None = None) -> None:
        """Keep these rows, in this order (repeats allowed); cut the buffers to so many columns, if given."""
        self.mask = self.mask[rows]
        for layer in self.layers:
            layer.buffer = layer.buffer[:, rows, :, :columns]
            layer.keys, layer.values = layer.buffer[:, :, :, : layer.get_seq_length()]

    def move(self, source: torch.Tensor, to: torch.Tensor) -> None:
        """Put rows `source` in the places `to`."""
        self.mask[to] = self.mask[source]
        for layer in self.layers:
            layer.buffer[:, to] = layer.buffer[:, source]


@torch.inference_mode()
def generate(agent, prompts, cache, max_new_tokens: int, temperature: float, generator) -> list[list[int]]:
    """Sample a response to each prompt, EOS included; the cache then holds all but the last token of each history.
    prompts[j]: what the cache lacks of episode j's history, the rest is in its row place[j]; all if it is empty."""
    empty, order = cache.mask is None, sorted(range(len(prompts)), key=lambda r: -len(prompts[r]))  # the longest first
    read = [tuple(prompts[r]) for r in order]
    read = list(dict.fromkeys(read)) if empty else read  # p rows: equal first prompts are read once
    ids = pad_sequence([torch.tensor(x) for x in read], True, -1, "left").to(agent.model.device)  # (p, S)
    real, ids = (ids >= 0).long(), ids.clamp(min=0)
    eos, rows = ids.new_tensor(sorted(agent.eos)), ids.new_tensor(order)  # rows (B,): which prompt a row answers
    cache.mask = real.new_zeros(len(rows), 0) if empty else cache.mask  # (B, columns)
    cache.select(rows if empty else cache.place[rows])
    sampled = ids.new_full((len(prompts), max_new_tokens), -1)  # (B, R), -1 after the end
    for step in range(max_new_tokens):
        past, by = cache.mask.shape[1], max(8, ids.shape[1] // 8)
        cache.mask = torch.cat([cache.mask[: len(real)], real], 1)  # (p, columns), then (B, columns)
        positions = (cache.mask.cumsum(1) - 1)[:, past:].clamp(min=0)  # (p, S), then (B, 1): real tokens counted
        for at in range(0, ids.shape[1], by):  # prefill in at most 9 parts, without rows that are only padding so far
            k = len(ids) if step else sum(len(x) + at + by > ids.shape[1] for x in read)
            seen = {"attention_mask": cache.mask[:k, : past + at + by], "position_ids": positions[:k, at : at + by]}
            out = agent.model(ids[:k, at : at + by], **seen, past_key_values=cache, logits_to_keep=1)
        logits = out.logits[:, -1].to(agent.model.dtype)  # (p, V), then (k, V)
        if empty and step == 0:
            index = ids.new_tensor([read.index(tuple(prompts[r])) for r in order])  # (B,)
            cache.select(index, cache.mask.shape[1])
            logits = logits[index]  # (B, V)
        cdf = F.softmax(logits / temperature, -1).cumsum(-1, dtype=torch.float64)  # (B, V), then (k, V), of pi(. | h)
        uniform = 1 - torch.rand(len(cdf), 1, dtype=cdf.dtype, device=cdf.device, generator=generator)  # (k, 1)
        ids = torch.searchsorted(cdf, uniform * cdf[:, -1:]).clamp(max=cdf.shape[1] - 1)  # (k, 1); NaN would give V
        sampled[rows[: len(ids)], step] = ids[:, 0]
        going = ~torch.isin(ids[:, 0], eos)  # (k,)
        k = int(going.sum())  # as many rows go on
        if k == 0:
            break
        if k < len(ids):  # ended rows leave the batch: rows from its end that go on take their places
            holes, movers = (~going[:k]).nonzero()[:, 0], k + going[k:].nonzero()[:, 0]
            source, to = torch.cat([movers, holes]), torch.cat([holes, movers])
            cache.move(source, to)
            rows[to], ids[to] = rows[source], ids[source]
            ids = ids[:k]
        real = (torch.arange(len(prompts), device=ids.device) < k).long()[:, None]  # (B, 1)
    cache.place = rows.argsort()
    return [[token for token in response if token >= 0] for response in sampled.tolist()]


# =================================================== logprobs ===================================================
def logprobs(agent, tokens, turns, num_turns: int, temperature: float) -> torch.Tensor:
    """log pi(a_t | h_t) of all turns of b episodes, from one forward: (T, b), 0 where an episode has no turn t. It is
    the sum over the tokens of the response, EOS included if it has one, at the temperature of the sampling.
    tokens: b histories; turns: for each of their tokens the turn of the response it belongs to, or -1."""
    ids, turns, episodes, shared = envs.pack(tokens, turns, agent.model)  # (p, S): those of one o_0 may share a row
    actions, turns = ids.roll(-1, 1), turns.roll(-1, 1)  # (p, S), of the next token; column 0 is no response
    acts = turns >= 0  # (p, S)
    # A boolean logits_to_keep: logits exist at acts only, (n, V)
    logits = agent.model(ids, use_cache=False, logits_to_keep=acts, **shared).logits.to(agent.model.dtype)
    logp = -F.cross_entropy(logits / temperature, actions[acts], reduction="none")  # (n,); log pi(a_t | h_t) is a sum
    return logp.new_zeros(num_turns, len(tokens)).index_put((turns[acts], episodes[acts]), logp, accumulate=True)


# ==================================================== rollout ====================================================
@dataclass
class Episode:
    """One episode. It only grows, turn by turn; nothing in it is ever rewritten."""

    item: dict
    tokens: list[list[int]]  # [agent] h_i and its last response: the very ids that were read and sampled
    turns: list[list[int]]  # [agent] for each token, the turn of the response it belongs to; -1 in observations
    texts: list[list[str]]  # [agent] o_0, a_0, o_1, a_1, ...
    rewards: list[float]  # [turn] raw reward + shift
    infos: list[dict]  # [turn] metrics of the task


def rollout(task: envs.Task, items: list[dict], agents: list[Agent], args: Args, generator) -> list[Episode]:
    """Play one episode of each item, all in parallel; an episode ends after num_turns turns or at success."""
    shift = task.reward_shift if args.reward_shift is None else args.reward_shift
    limit = args.max_new_tokens or task.max_new_tokens
    episodes = [Episode(item, *([[] for _ in agents] for _ in range(3)), [], []) for item in items]
    going, observations = episodes, [task.observe(item) for item in items]  # [episode], [episode][agent]
    caches = [RowsCache(layer_class_to_replicate=RowsLayer) for _ in agents]
    seeds = torch.randint(2**62, (len(agents),), generator=generator, device=generator.device).tolist()
    generators = [torch.Generator(a.model.device).manual_seed(s) for a, s in zip(agents, seeds, strict=True)]

    def act(i: int, agent: Agent) -> None:
        """Agent i reads its observation, and responds (`going`, `observations` and `turn` are of the loop below)."""
        frames = [agent.frame(o[i], e.tokens[i]) for e, o in zip(going, observations, strict=True)]
        prompts = [e.tokens[i][-1:] + x for e, x in zip(going, frames, strict=True)]  # last token: not cached yet
        longest = (0 if caches[i].mask is None else caches[i].mask.shape[1]) + max(map(len, prompts)) + limit
        if longest > envs.max_length(agent.model):
            raise envs.UserError(f"agent {i}: {longest} tokens, padding included, are longer than its model reads")
        responses = generate(agent, prompts, caches[i], limit, args.temperature, generators[i])
        for e, o, frame, response in zip(going, observations, frames, responses, strict=True):
            e.tokens[i] += frame + response
            e.turns[i] += [-1] * len(frame) + [turn] * len(response)
            e.texts[i] += [o[i], agent.tokenizer.decode(response, skip_special_tokens=True)]

    for turn in range(task.num_turns):
        envs.each(act, agents, at_once=len(args.agent_devices) > 1)
        actions = [[texts[-1] for texts in e.texts] for e in going]  # [episode][agent]
        scores = envs.score_batch(task, [e.item for e in going], actions)
        for e, (reward, info) in zip(going, scores, strict=True):
            e.rewards.append(reward + shift)
            e.infos.append(info)
        keep = [k for k, (reward, _) in enumerate(scores) if reward < task.success]  # success ends an episode early
        if turn + 1 == task.num_turns or not keep:
            break
        observations = [task.feedback(going[k].item, actions[k], scores[k][1], turn) for k in keep]
        going = [going[k] for k in keep]
        for cache in caches:
            cache.place = cache.place[keep]
    return episodes


# ==================================================== update ====================================================
def gae(rewards, values, live, gamma: float, gae_lambda: float) -> torch.Tensor:
    """Generalised advantages over turns (T, ...). With gae_lambda 0: TD errors; with 1 and values 0: returns-to-go."""
    advantages = torch.zeros_like(values)
    advantage = next_value = torch.zeros_like(values[0])
    for t in reversed(range(len(values))):
        # TD error: delta_t = r_t + gamma V(h_{t+1}) - V(h_t); GAE (1506.02438): A_t = delta_t + gamma lambda A_{t+1}
        delta = rewards[t] + gamma * next_value - values[t]
        advantage = advantages[t] = (delta + gamma * gae_lambda * advantage) * live[t]
        next_value = values[t] * live[t]  # so that the last live turn bootstraps 0
    return advantages


def update(episodes, agents, critics, num_turns: int, args: Args, iteration: int) -> dict[str, list[float]]:
    """One gradient step of each model for each minibatch of whole episodes. Metrics [agent], means over minibatches."""
    metrics, device, rng = [], agents[0].model.device, np.random.default_rng([args.seed, iteration])
    for index in np.split(rng.permutation(len(episodes)), args.num_minibatches):
        mb = [episodes[k] for k in index]
        live = torch.tensor([[t < len(e.rewards) for e in mb] for t in range(num_turns)], device=device)  # (T, B)
        num_live = envs.all_sum(live.sum())  # (), of all ranks: it divides the losses
        rewards = torch.zeros(live.shape, dtype=agents[0].model.dtype, device=device)  # (T, B)
        rewards.T[live.T] = rewards.new_tensor([r for e in mb for r in e.rewards])  # 0 at dead turns
        values = rewards.new_zeros(num_turns, len(mb), len(agents))  # (T, B, N)
        for critic in critics:  # one forward gives V at all turns; detached, it is in target and advantage
            tokens, ends = zip(*map(critic.encode, mb), strict=True)
            for rows in envs.microbatches([len(x) for x in tokens], args.microbatch_tokens):
                v = critic([tokens[k] for k in rows], [ends[k] for k in rows], num_turns).to(device)  # (T, b)
                fixed = v.detach()  # (T, b)
                # Critic target: r_t + gamma V(h_{t+1}), as V + TD error; the lambda-return if gae_lambda > 0
                target = fixed + gae(rewards[:, rows], fixed, live[:, rows], args.gamma, args.gae_lambda)  # (T, b)
                # Critic loss: mean over live turns of (V(h_t) - target)^2
                loss = args.vf_coef * ((v - target) ** 2)[live[:, rows]].sum() / num_live
                loss.backward()
                values[:, torch.tensor(rows)[:, None], critic.reads] = fixed.unsqueeze(-1)
            optimize(f"iteration {iteration}, critic of agents {critic.reads}", critic, args.max_grad_norm)
        # Advantage A_t: TD error (GAE if gae_lambda > 0), its baseline V(h_t); critic_type q: Q(h_t, a_t), no baseline
        errors = gae(rewards.unsqueeze(-1), values, live.unsqueeze(-1), args.gamma, args.gae_lambda)  # (T, B, N)
        advantages = errors if args.critic_type == "v" else values * live.unsqueeze(-1)
        mean = envs.all_sum(advantages[live].sum(0)) / num_live  # (N,)
        variance = envs.all_sum(((advantages - mean)[live] ** 2).sum(0)) / num_live  # (N,)
        if args.norm_adv:  # advantage normalisation: (A_t - mean) / sd
            advantages = (advantages - mean) / (variance.sqrt() + 1e-8)  # dead turns: not 0, but logp is
        logps, kl, norms = torch.zeros_like(advantages), torch.zeros_like(mean), []  # (T, B, N), (N,)
        for i, agent in enumerate(agents):  # one forward gives log pi of all turns
            for rows in envs.microbatches([len(e.tokens[i]) for e in mb], args.microbatch_tokens):
                tokens, turns = [mb[k].tokens[i] for k in rows], [mb[k].turns[i] for k in rows]
                logp = logprobs(agent, tokens, turns, num_turns, args.temperature).to(device)  # (T, b), 0 if dead
                # Policy gradient: grad log pi_i(a_it | h_it) A_it, mean over live turns
                loss = -(logp * advantages[:, rows, i]).sum() / num_live
                if args.kl_coef:
                    with torch.no_grad(), agent.model.disable_adapter() if args.lora_rank else torch.no_grad():
                        reference = logprobs(agent.reference, tokens, turns, num_turns, args.temperature).to(device)
                    # KL penalty: grad KL(pi_i || reference) = E[grad log pi_i (log pi_i - log reference)]
                    log_ratio = logp.detach() - reference  # (T, b)
                    loss = loss + args.kl_coef * (logp * log_ratio).sum() / num_live
                    kl[i] += log_ratio.sum() / live.sum()
                loss.backward()
                logps[:, rows, i] = logp.detach()
            norms.append(optimize(f"iteration {iteration}, agent {i}", agent, args.max_grad_norm).to(device))
        num_tokens = logps.new_tensor([sum(t >= 0 for e in mb for t in e.turns[i]) for i in range(len(agents))])  # (N,)
        ended = [[e.tokens[i][-1] in agent.eos for e in mb] for i, agent in enumerate(agents)]  # [agent][episode]
        returns = gae(rewards.unsqueeze(-1), torch.zeros_like(values), live.unsqueeze(-1), args.gamma, 1.0)  # G_t
        metrics.append({
            "losses/policy_loss": -(logps * advantages).sum((0, 1)) / live.sum(),
            "losses/value_loss": (errors**2)[live].mean(0),  # error: target - V
            "losses/explained_variance": 1 - (returns - values)[live].var(0) / returns[live].var(0),
            "losses/advantage_variance": variance,
            "losses/entropy": -logps.sum((0, 1)) / num_tokens,  # of a token, estimated from the samples
            "losses/grad_norm": torch.stack(norms),
            "charts/response_length": num_tokens / live.sum(),
            "charts/eos_rate": logps.new_tensor(ended).mean(1),  # of last responses
        } | ({"losses/kl": kl} if args.kl_coef else {}))  # fmt: skip
    return {name: torch.stack([x[name] for x in metrics]).mean(0).tolist() for name in metrics[0]}


# =================================================== evaluate ===================================================
def evaluate(task: envs.Task, agents: list[Agent], args: Args, device) -> tuple[dict[str, float], list[Episode]]:
    """Metrics over eval_samples episodes of each held-out item, after each turn and at the end; and the episodes."""
    start, generator = time.time(), torch.Generator(device).manual_seed(args.seed + envs.rank())
    items = [x for x in task.eval[: args.eval_episodes // args.eval_samples] for _ in range(args.eval_samples)]
    episodes = envs.gather([e for xs in envs.parts(items, args) for e in rollout(task, xs, agents, args, generator)])
    metrics = {"episodic_return": sum(sum(e.rewards) for e in episodes) / len(episodes)}
    metrics["tokens"] = sum(t >= 0 for e in episodes for turns in e.turns for t in turns) / len(episodes)
    metrics["time"] = (time.time() - start) / len(episodes)  # wall time over episodes
    metrics |= task.summarize([e.infos for e in episodes], args.eval_samples)
    return {f"eval/{name}": value for name, value in metrics.items()}, episodes


# ================================================== checkpoint ==================================================
def save(run_dir: Path, agents: list[Agent], models: list[nn.Module], args: Args, iteration: int, global_step: int):
    """Export the agents to agent_{i}/, then write a checkpoint; each takes the old one's place once it is complete."""
    for i, agent in enumerate(agents):
        with envs.replacing(run_dir / f"agent_{i}") as folder:
            agent.model.save_pretrained(folder)
            agent.tokenizer.save_pretrained(folder)
    envs.write_checkpoint(run_dir, models, args, iteration, global_step)


# ===================================================== main =====================================================
def main(args: Args) -> None:
    """Train, evaluate and save one team."""
    task = envs.make(args.task, args.num_agents, args.num_turns, args.dataset, args.feedback, args.sparse)
    device = envs.join_ranks(args.device)
    torch.manual_seed(args.seed)
    names = args.model * args.num_agents if len(args.model) == 1 else args.model
    devices = cycle([torch.device(x) for x in args.agent_devices] or [device])
    agents = [Agent(name, args, next(devices)) for name in names]
    # N critics V_i(h_it), each of which reads the history of its own agent alone
    critics = [Critic(name, [i], args, next(devices)) for i, name in enumerate(names)]
    models = [*agents, *critics]
    run_dir = envs.run_folder(args)
    iteration, global_step = envs.read_checkpoint(run_dir, models, args, device) if args.resume else (0, 0)
    stop = envs.stop_signal()  # Ctrl-C or SIGTERM: save after this iteration, and end
    writer = envs.open_run(run_dir, args, global_step)
    generator, start_time, start_step = torch.Generator(device), time.time(), global_step
    scalars, fresh = {}, not args.resume  # fresh: this step is still to be evaluated and saved
    bar = tqdm(total=args.total_env_steps, initial=global_step, unit="step", disable=envs.rank() > 0)
    while True:
        done = global_step >= args.total_env_steps
        last = done or envs.any_rank(stop.is_set(), device)
        if fresh and (done or iteration % (args.eval_every or 10**9) == 0):
            metrics, episodes = evaluate(task, agents, args, device)
            for k, e in enumerate(episodes[:: args.eval_samples][:4]):
                writer.add_text(f"episodes/{k}", envs.transcript(task, e.item, e.texts, e.rewards), global_step)
            shown = [f"{name[5:]} {value:.3f}" for name, value in metrics.items() if "/turn_" not in name]
            bar.write(f"held-out at step {global_step}: " + ", ".join(shown))
            scalars |= metrics
        for name, value in scalars.items():
            writer.add_scalar(name, value, global_step)
        if envs.rank() == 0 and fresh and (last or iteration % (args.save_every or 10**9) == 0):
            writer.flush()
            save(run_dir, agents, models, args, iteration, global_step)
        if last:
            break
        generator.manual_seed(args.seed << 32 | envs.rank() << 24 | iteration)  # so that resuming needs no random state
        items = envs.sample(task.train, args.num_envs, args.seed, iteration)
        rollout_start, reward_time = time.time(), task.reward_time
        episodes = [e for xs in envs.parts(items, args) for e in rollout(task, xs, agents, args, generator)]
        update_start = time.time()
        metrics = update(episodes, agents, critics, task.num_turns, args, iteration)
        end = time.time()
        num_steps = int(envs.all_sum(torch.tensor(sum(len(e.rewards) for e in episodes), device=device)))
        fresh, iteration, global_step = True, iteration + 1, global_step + num_steps
        scalars = {f"{name}/agent_{i}": x for name, xs in metrics.items() for i, x in enumerate(xs)}
        scalars |= {f"charts/{name}": x for name, x in task.summarize([e.infos for e in episodes]).items()}
        scalars |= {name: sum(xs) / len(xs) for name, xs in metrics.items()} | {
            "charts/episodic_return": sum(sum(e.rewards) for e in episodes) / len(episodes),
            "charts/SPS": (global_step - start_step) / (end - start_time),
            "charts/learning_rate": args.actor_lr,
            "charts/tokens_per_second": num_steps * sum(metrics["charts/response_length"]) / (end - rollout_start),
            "charts/peak_memory_gb": envs.peak_memory_gb(device),
            "time/rollout": update_start - rollout_start,
            "time/reward": task.reward_time - reward_time,  # a part of the rollout
            "time/update": end - update_start,
        }
        bar.set_postfix({"return": scalars["charts/episodic_return"], "SPS": scalars["charts/SPS"]}, refresh=False)
        bar.update(num_steps)
    bar.write(f"the agents are in {run_dir}/agent_0 to agent_{args.num_agents - 1}, at step {global_step}")
    bar.close()
    writer.close()


if __name__ == "__main__":
    envs.command_line(Args, main)
