"""Builds models/tiny from nothing: tokenizer, scripted demonstrations, a 1.1M-parameter Llama and its card.

    python models/tiny/pretrain.py            # train, save beside this file, measure
    python models/tiny/pretrain.py --report   # only measure what is there

A demonstration is one role's chat alone: a scripted writer picks one of several conventions at random and slips now and
then, the task gives its real feedback to that answer joined with an equally random teammate's, and the writer answers
again. So the model learns to speak, and nothing of what its teammate means. Held-out items only measure. To add a task,
write its writer and name it in `WRITERS`.
"""

import argparse
import json
import math
import os
import random
import re
import shutil
import sys
import time
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
import envs  # noqa: E402

END, PAD, ROLES = "<|end|>", "<|pad|>", ["<|system|>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


# ------------------------------------------------------------------------------------------------ demonstrations
def pick(rng, weights):
    return rng.choices(list(weights), list(weights.values()))[0]


# What `aux` can mean, with how often each role takes it so (they disagree on purpose), and the body that follows from
# it. `fold` in front: what the problem asks of the list. The last of main's does without aux.
FILTERED, FULL = "[{each} for {each} in {source} if {keep}]", "[{map} for {each} in {source} if {keep}]"
CODING = [
    {"map": (0.37, "{map}"), "keep": (0.28, "{keep}"), "kept": (0.22, FILTERED), "mapped": (0.09, FULL)},
    {
        "map": (0.13, "fold[aux({each}) for {each} in {source} if {keep}]"),
        "keep": (0.17, "fold[{map} for {each} in {source} if aux({each})]"),
        "kept": (0.26, "fold[{map} for {each} in aux({arg})]"),
        "mapped": (0.34, "foldaux({arg})"),
        "all": (0.06, "aux({arg})"),
        "none": (0.04, "fold" + FULL),
    },
]
CODING[0]["all"] = (0.04, "fold" + FULL)


def write_coding(rng, item, agent, memory):
    """Agent 0's `aux`, agent 1's main function, or (agent None) both. Half of the time a later answer keeps the
    convention of the one before, which is all that `memory` is for."""
    if agent is None:
        aux = write_coding(rng, item, 0, memory)
        keep = {"convention": memory["convention"]} if memory["convention"] != "all" else {}
        return aux + "\n\n" + write_coding(rng, item, 1, keep)
    new = pick(rng, {name: weight for name, (weight, _) in CODING[agent].items()})
    new = memory["convention"] = memory["convention"] if "convention" in memory and rng.random() < 0.5 else new
    parts, name, slip = dict(item["parts"]), [item["entry_point"], "aux"][agent == 0], rng.random()
    arg = parts["each"] if agent == 0 and new in ("map", "keep") else parts["arg"]
    if slip < 0.02:  # a wrong constant or operator
        field = rng.choice(["keep", "map"])
        a, b = rng.choice([("2", "3"), ("3", "4"), (">", "<"), ("<", ">"), ("+", "-"), ("==", "!=")])
        parts[field] = parts[field].replace(a, b, 1)
    body = CODING[agent][new][1].format(**parts)
    if body.startswith("fold"):
        plain = parts["fold"] == "list({})" and body[4] == "["
        body = body[4:] if plain else parts["fold"].format(body[4:])
    if 0.02 < slip < 0.026 and body[-1] in ")]":
        body = body[:-1]
    name = "helper" if 0.026 < slip < 0.031 and agent == 0 else name
    return f"def {name}({arg}){'' if 0.031 < slip < 0.036 else ':'}\n    {'' if slip > 0.997 else 'return '}{body}"


# task: (writer, number of chats, share of them with a single agent that plays both parts)
WRITERS = {"coding": (write_coding, 32000, 0.1)}


def conversations(name, items, count, seed):
    """`count` chats (lists of messages) of one role each; the roles of a team are written apart, scored together."""
    (write, _, share), rng, chats, order = WRITERS[name], random.Random(seed), [], []
    alone, team = envs.make(name, num_agents=1), envs.make(name)
    while len(chats) < count:
        order = order or rng.sample(items, len(items))
        item, (task, agents) = order.pop(), (alone, [None]) if rng.random() < share else (team, [0, 1])
        texts, new, memories = task.observe(item), [[] for _ in agents], [{} for _ in agents]
        for turn in range(task.num_turns):
            actions = [write(rng, item, *pair) for pair in zip(agents, memories, strict=True)]
            for chat, text, action in zip(new, texts, actions, strict=True):
                chat += [{"role": "user", "content": text}, {"role": "assistant", "content": action}]
            reward, info = task.score(item, actions)
            if reward >= task.success:
                break
            texts = task.feedback(item, actions, info, turn)
        chats += new
    return chats


# ------------------------------------------------------------------------------------------------ tokens
def make_tokenizer(texts):
    """Byte-level BPE: any text encodes; parts of a name (`_over_5`) and numbers (`, 5`) are single tokens."""
    tokenizer = Tokenizer(models.BPE())
    pattern = Regex(r"\n+ *| ?_?[A-Za-z]+(?:_\d+)?|,? ?[-_]?\d+| ?[^\sA-Za-z\d]+|\s+")
    split = pre_tokenizers.Split(pattern, "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = [PAD, END, *ROLES]
    options = {"special_tokens": special, "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=2048, **options))
    names = {"eos_token": END, "pad_token": PAD, "additional_special_tokens": ROLES, "model_max_length": 4096}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names)
    fast.chat_template = TEMPLATE
    return fast


def encode(tokenizer, chat, user_weight=0.1):
    """(token ids, weight of each as a target): 1 for answers and their end, little for what they answer to."""
    ids, weights = [], []
    for message in chat:
        tokens = tokenizer(message["content"] + END)["input_ids"]
        ids += [tokenizer.convert_tokens_to_ids(f"<|{message['role']}|>"), *tokens]
        weights += [0.0, *[1.0 if message["role"] == "assistant" else user_weight] * len(tokens)]
    return ids, weights


def batches(rng, data, size, pad):
    """(ids, weights), both (B, S), of chats of similar length, about `size` tokens each, in random order. Right padding
    needs no attention mask in a causal model; its weight is 0."""
    out, rows = [], []
    order = sorted(range(len(data)), key=lambda i: (len(data[i][0]), rng.random()))
    for i, following in zip(order, [*order[1:], None], strict=True):
        rows.append(data[i])
        if following is None or (len(rows) + 1) * len(data[following][0]) > size:
            out, rows = [*out, rows], []
    rng.shuffle(out)
    for rows in out:
        longest = max(len(ids) for ids, _ in rows)
        yield (
            torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in rows]),
            torch.tensor([weights + [0.0] * (longest - len(weights)) for _, weights in rows]),
        )


# ------------------------------------------------------------------------------------------------ train
def loss_of(model, ids, weights):
    """Weighted mean of the next-token cross-entropy, and the sum of the weights."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]  # (B, S-1, V)
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")  # (B*(S-1),)
    targets = weights[:, 1:].flatten()  # (B*(S-1),)
    return (nll * targets).sum() / targets.sum(), targets.sum().item()


def train(args):
    start, rng = time.time(), random.Random(3)
    torch.manual_seed(0)
    chats, tests = {}, {}
    for name, (_, count, _) in WRITERS.items():
        task = envs.make(name)
        chats[name] = conversations(name, task.train, int(count * args.scale), seed=1)
        tests[name] = conversations(name, task.eval, 400, seed=2)
        print(f"{name}: {len(chats[name])} chats, {time.time() - start:.0f} s", flush=True)
    tokenizer = make_tokenizer(m["content"] for many in chats.values() for chat in many[:8000] for m in chat)
    data = [encode(tokenizer, chat) for many in chats.values() for chat in many]
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
    ids = {"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": end, "pad_token_id": pad}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **ids, max_position_embeddings=4096, tie_word_embeddings=True))
    tokens, steps = (
        sum(len(ids) for ids, _ in data),
        len(list(batches(rng, data, args.batch_tokens, pad))) * args.epochs,
    )
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), fused=True)
    print(f"{model.num_parameters()} parameters, {steps} steps, {tokens} tokens an epoch", flush=True)
    plan = (batch for _ in range(args.epochs) for batch in batches(rng, data, args.batch_tokens, pad))
    mean = None
    for step, batch in enumerate(plan):
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / 100) * (0.01 + 0.99 * cosine)
        loss, _ = loss_of(model, *batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        if step % 200 == 0:
            print(f"step {step} loss {mean:.4f} {time.time() - start:.0f} s", flush=True)
    facts = {"parameters": model.num_parameters(), "vocabulary": len(tokenizer), "tokens": tokens}
    facts |= {"epochs": args.epochs, "steps": steps, "chats": {name: len(many) for name, many in chats.items()}}
    facts["loss"] = {}
    with torch.inference_mode():
        for name, many in tests.items():
            data = [encode(tokenizer, chat, 0.0) for chat in many]
            pairs = [loss_of(model, *batch) for batch in batches(rng, data, args.batch_tokens, pad)]
            facts["loss"][name] = round(sum(loss.item() * n for loss, n in pairs) / sum(n for _, n in pairs), 4)
    facts["minutes"] = round((time.time() - start) / 60, 1)
    print(json.dumps(facts), flush=True)
    save(args.out, model, tokenizer, facts)


def save(out, model, tokenizer, facts):
    """Write beside, then move into place, so that a reader never sees half a file."""
    temp = out / ".new"
    shutil.rmtree(temp, ignore_errors=True)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(temp)
    tokenizer.save_pretrained(temp)
    (temp / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")
    for file in temp.iterdir():
        file.chmod(0o644)
        os.replace(file, out / file.name)
    temp.rmdir()


# ------------------------------------------------------------------------------------------------ report
def generate(model, tokenizer, chats, max_new_tokens):
    """(one answer to each chat, sampled at temperature 1; the share that ended by themselves)."""
    answers, ended = [None] * len(chats), 0
    texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for rows in (order[at : at + 256] for at in range(0, len(order), 256)):
        batch = tokenizer([texts[i] for i in rows], return_tensors="pt", padding=True, padding_side="left")
        with torch.inference_mode():
            out = model.generate(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=max_new_tokens,
                do_sample=True, top_k=0, top_p=1.0, pad_token_id=tokenizer.pad_token_id,
            )[:, batch["input_ids"].shape[1] :]  # fmt: skip
        ended += (out == tokenizer.eos_token_id).any(1).sum().item()
        for i, row in zip(rows, out, strict=True):
            answers[i] = tokenizer.decode(row, skip_special_tokens=True)
    return answers, ended / len(chats)


def report(out, repeats=4):
    """Metrics of teams that sample at temperature 1 on held-out items, token counts, and each role's answers."""
    torch.manual_seed(4)
    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out).eval()
    measured = {}
    for name in WRITERS:
        task, tokens, first, ends = envs.make(name), {}, [], []
        items = [item for item in task.eval for _ in range(repeats)]
        chats = [[[{"role": "user", "content": text}] for text in task.observe(item)] for item in items]
        live, rewards, infos = list(range(len(items))), [0.0] * len(items), [{}] * len(items)
        for turn in range(task.num_turns):
            flat = [chat for i in live for chat in chats[i]]
            told = [chat[-1]["content"] for chat in flat]
            answers, ended = generate(model, tokenizer, flat, task.max_new_tokens)
            ends.append(ended)
            for kind, texts in (("feedback" if turn else "observation", told), ("answer", answers)):
                tokens.setdefault(kind, []).extend(len(ids) + 1 for ids in tokenizer(texts)["input_ids"])
            for i, actions in zip(live, zip(*[iter(answers)] * 2, strict=True), strict=True):
                rewards[i], infos[i] = task.score(items[i], actions)
                first += [(items[i], actions, infos[i])] * (turn == 0)
                texts = task.feedback(items[i], actions, infos[i], turn)
                for chat, action, text in zip(chats[i], actions, texts, strict=True):
                    chat += [{"role": "assistant", "content": action}, {"role": "user", "content": text}]
            live = [i for i in live if rewards[i] < task.success]
        found = {f"first turn {k}": v for k, v in task.average([[info] for *_, info in first]).items()}
        found |= task.average([[info] for info in infos]) | {"ended": sum(ends) / len(ends)}
        found |= report_coding(task, first) if name == "coding" else {}
        measured[name] = {k: round(v, 3) if isinstance(v, float) else v for k, v in found.items()}
        measured[name]["tokens (mean, max)"] = {k: (round(sum(v) / len(v), 1), max(v)) for k, v in tokens.items()}
        print(name, json.dumps(measured[name], indent=1), flush=True)
    return measured


def coding_convention(text, agent):
    """Which convention an answer follows, by its looks: they are all one line long."""
    if agent == 0:
        marks = {"kept": r"return \[(\w) for \1", "mapped": r"return \[", "all": " for ", "keep": r"[<>=]=? | in "}
        return next((name for name, mark in marks.items() if re.search(mark, text)), "map")
    marks = {"keep": r"if aux\(", "kept": r"in aux\(", "all": r"return aux\(", "map": r"aux\(\w\) for"}
    return next((name for name, mark in marks.items() if re.search(mark, text)), "mapped" if "aux(" in text else "none")


def report_coding(task, first):
    """Share of well-formed answers of each role, its conventions, and pass@1 of pairs that follow the same one."""
    formed, shares, pairs = [0, 0], [{}, {}], {}
    for item, actions, _ in first:
        for agent, text in enumerate(actions):
            name, convention = [item["entry_point"], "aux"][agent == 0], coding_convention(text, agent)
            formed[agent] += envs.coding_tree(text)[0] is not None and envs.coding_defines(text, name)
            shares[agent][convention] = round(shares[agent].get(convention, 0) + 1 / len(first), 4)
            pairs.setdefault((item["entry_point"], convention), (item, [], []))[1 + agent].append(text)
    pairs = {key: found for key, found in pairs.items() if key[1] not in ("all", "none")}
    matched = [(item, [aux, main]) for item, auxes, mains in pairs.values() for aux in auxes for main in mains]
    together = [task.score(item, actions)[1]["pass@1"] for item, actions in matched]
    found = {"well formed": [round(n / len(first), 3) for n in formed], "conventions": shares}
    return found | {"same convention pass@1": sum(together) / len(together), "same convention pairs": len(together)}


CARD = """---
library_name: transformers
license: mit
---
# tiny

A Llama of {parameters} parameters that speaks the format of the tasks in `envs.py` and has agreed on nothing with its
teammate: the start from which the scripts of this repository learn. Built by `python models/tiny/pretrain.py` from
nothing, in {minutes} minutes on two CPU cores.

- Model: 4 layers, 4 heads, hidden size 128, tied embeddings, float32. Tokenizer: byte-level BPE of {vocabulary} tokens
  with a chat template; `<|end|>` ends a message and is the EOS.
- Data: scripted demonstrations of one role at a time, with mixed conventions and slips, of train items alone: {chats}
  chats, {tokens} tokens, {epochs} passes, {steps} steps. The held-out items of a task are never trained on.
- Loss on the answers to held-out items, nats a token: {loss}.

Teams of two of it on held-out items, sampled at temperature 1 (`python models/tiny/pretrain.py --report`):

```
{report}
```
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the model")
    parser.add_argument("--report", action="store_true", help="only measure the model in --out")
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of chats")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    args = parser.parse_args()
    torch.set_num_threads(2)
    if not args.report:
        train(args)
    facts = json.loads((args.out / "facts.json").read_text())
    measured = json.dumps(report(args.out), indent=1)
    (args.out / "README.md").write_text(CARD.format(**facts, report=measured))


if __name__ == "__main__":
    main()
