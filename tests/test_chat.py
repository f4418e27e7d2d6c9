"""Histories hold exactly the tokens that a chat template gives for the whole chat."""

import pytest
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import collm_cc
import envs

USERS = ["Write a helper.\nIt doubles x", "  Two tests fail: (1, 2) ", "Once more"]
REPLIES = ["def aux(x):\n    return 2 * x", "Sure! Here it is", "ok"]

CHATML = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
CHATML_SYSTEM = "<|im_start|>system\nYou help.<|im_end|>\n" + CHATML
LLAMA_2 = """{% for m in messages %}{% if m.role == 'user' %}\
{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}\
{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"""
LLAMA_3 = """{{ bos_token }}{% for m in messages %}\
{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + (m.content | trim) + '<|eot_id|>' }}\
{% endfor %}{% if add_generation_prompt %}\
{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
GEMMA = """{{ bos_token }}{% for m in messages %}\
{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles') }}{% endif %}\
{% set role = 'model' if m.role == 'assistant' else m.role %}\
{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""
MISTRAL_1 = """{{ bos_token }}{% for m in messages %}\
{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}\
{% elif m.role == 'assistant' %}{{ m.content + eos_token }}\
{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"""
MISTRAL_3 = """{{ bos_token }}{% for m in messages %}\
{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}\
{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}"""
ZEPHYR = """{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""
PHI_3 = """{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end_of|>\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""
GLM = """[gMASK]<sop>{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""
SPACES = """{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|> ' + m.content }}\
{% else %}{{ '<|assistant|> ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""
PLAIN = """{% for m in messages %}{{ m.role + ': ' + m.content + '\n\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"""
QWEN_3 = """{% for m in messages %}{% set text = m.content %}\
{% if m.role == 'assistant' and '</think>' in text %}\
{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}\
{{ '<|im_start|>' + m.role + '\n' + text + '<|im_end|>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}\
{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}\
{% endif %}{% endif %}"""
DEEPSEEK_R1 = """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}\
{{ '<|user|>' + m.content }}{% else %}{% set text = m.content.split('</think>')[-1] %}\
{{ '<|assistant|>' + text + eos_token }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"""
ROUNDS = """{% for m in messages %}{% if m.role == 'user' %}\
{{ '[Round ' ~ (loop.index0 // 2) ~ ']\n' + m.content + '\nanswer:' }}\
{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"""
FORGETS = """{% for m in messages[-3:] %}\
{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
PARTS = """{% for m in messages %}{{ '<|im_start|>' + m.role }}\
{% for part in m.content %}{{ part['text'] }}{% endfor %}<|im_end|>{% endfor %}"""
TWICE = """{% for m in messages %}{{ m.content + '\n' + m.content + eos_token }}{% endfor %}"""
SYSTEM_FIRST = """{% if messages[0].role != 'system' %}\
{{ raise_exception('a system message comes first') }}{% endif %}"""
USER_ONLY = """{% for m in messages %}{% if m.role != 'user' %}\
{{ raise_exception('users only') }}{% endif %}{{ m.content }}{% endfor %}"""
BROKEN = "{% for m in messages %}{{ m.content }}"

# name: (template, the token that ends a turn)
APPENDING = {
    "chatml": (CHATML, "<|im_end|>"),
    "chatml_system": (CHATML_SYSTEM, "<|im_end|>"),
    "llama_2": (LLAMA_2, "</s>"),
    "llama_3": (LLAMA_3, "<|eot_id|>"),
    "gemma": (GEMMA, "<end_of_turn>"),
    "mistral_1": (MISTRAL_1, "</s>"),
    "mistral_3": (MISTRAL_3, "</s>"),
    "zephyr": (ZEPHYR, "</s>"),
    "phi_3": (PHI_3, "<|end_of|>"),
    "glm": (GLM, "<|user|>"),
    "spaces": (SPACES, "</s>"),
}
REWRITING = {
    "qwen_3": (QWEN_3, "<|im_end|>"),
    "deepseek_r1": (DEEPSEEK_R1, "</s>"),
    "rounds": (ROUNDS, "</s>"),
    "forgets": (FORGETS, "<|im_end|>"),
}
UNUSABLE = {
    "parts": (PARTS, "plain texts and print each once"),
    "twice": (TWICE, "plain texts and print each once"),
    "system_first": (SYSTEM_FIRST, "a system message comes first"),
    "user_only": (USER_ONLY, "users only"),
    "broken": (BROKEN, "its chat template"),
}
SPECIAL = """<|im_start|> <|im_end|> <|start_header_id|> <|end_header_id|> <|eot_id|> <|user|>
<start_of_turn> <end_of_turn> <|assistant|> <|end_of|> [gMASK] <sop>""".split()


def byte_level():
    """The tokens of models/tiny; line feeds stand apart, as with Llama 3 and Qwen."""
    tokenizer = AutoTokenizer.from_pretrained("models/tiny")
    pieces = Regex(r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s*\n+|\s+")
    split = pre_tokenizers.Split(pieces, "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    return tokenizer


def trained_bpe(kind: str):
    """A tokenizer whose spaces are ▁, in the newer or the older way of SentencePiece's models."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{k:02X}>" for k in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special)
    corpus = [*USERS, *REPLIES, CHATML, LLAMA_2, GEMMA, PLAIN, "user assistant model"]
    tokenizer.train_from_iterator(corpus * 3, trainer)
    if kind == "legacy":  # ▁ before every piece of text, also after a special token
        tokenizer.pre_tokenizer = None
        parts = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(parts)
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


@pytest.fixture(scope="module")
def tokenizers():
    """{kind: a function that makes a tokenizer with a template}."""
    trained = {kind: trained_bpe(kind) for kind in ("metaspace", "legacy")}

    def get(kind: str, template: str):
        if kind == "byte_level":
            tokenizer = byte_level()
        else:
            tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained[kind])
        names = {"bos_token": "<s>", "eos_token": "</s>"}
        special = SPECIAL + (["[INST]", "[/INST]"] if template == MISTRAL_3 else [])
        tokenizer.add_special_tokens({**names, "additional_special_tokens": special})
        tokenizer.chat_template = template
        return tokenizer

    return get


def make_chat(tokenizer) -> collm_cc.Chat:
    return collm_cc.Chat(tokenizer, {tokenizer.eos_token_id})


def whole(tokenizer, num_turns: int) -> list[int]:
    """The template's tokens of a chat up to where its reply number num_turns begins."""
    messages = []
    for user, reply in zip(USERS[:num_turns], REPLIES, strict=False):
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": reply}]
    options = {"add_generation_prompt": True, "enable_thinking": False, "return_dict": False}
    return list(tokenizer.apply_chat_template(messages[:-1], **options))


def reply_tokens(tokenizer, turn: int, end: int) -> list[int]:
    """The tokens of a reply and its end, as the template has them in the whole chat."""
    before, after = whole(tokenizer, turn), whole(tokenizer, turn + 1)
    assert after[: len(before)] == before
    return after[len(before) : after.index(end, len(before)) + 1]


KINDS = ["byte_level", "metaspace", "legacy"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", APPENDING)
def test_histories_are_the_templates_tokens(name, kind, tokenizers, capsys):
    template, end = APPENDING[name]
    tokenizer = tokenizers(kind, template)
    end = tokenizer.convert_tokens_to_ids(end)
    chat = make_chat(tokenizer)
    history = []
    for turn, user in enumerate(USERS, 1):
        history += chat.frame(user, history)
        assert history == whole(tokenizer, turn)
        if turn < len(USERS):
            history += reply_tokens(tokenizer, turn, end)
    assert end in chat.eos
    assert "rewrites" not in capsys.readouterr().err


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*APPENDING, *REWRITING])
def test_a_reply_that_was_cut_is_ended_once(name, kind, tokenizers):
    template, end = (APPENDING | REWRITING)[name]
    tokenizer = tokenizers(kind, template)
    end = tokenizer.convert_tokens_to_ids(end)
    chat = make_chat(tokenizer)
    history = chat.frame(USERS[0], [])
    reply = chat.encode(REPLIES[1])
    cut = chat.frame(USERS[1], history + reply)
    ended = chat.frame(USERS[1], [*history, *reply, end])
    assert cut[-len(ended) - 1 :] == [end, *ended]
    assert cut.count(end) == ended.count(end) + 1
    if name in APPENDING and kind == "byte_level":
        before, after = whole(tokenizer, 1), whole(tokenizer, 2)
        reply = reply_tokens(tokenizer, 1, end)[:-1]
        while reply and chat.before_end and not tokenizer.decode(reply[-1:]).strip():
            del reply[-1]
        assert before + reply + chat.frame(USERS[1], before + reply) == after


@pytest.mark.parametrize("name", REWRITING)
def test_a_template_that_rewrites_the_past_is_told(name, tokenizers, capsys):
    template, end = REWRITING[name]
    tokenizer = tokenizers("byte_level", template)
    end = tokenizer.convert_tokens_to_ids(end)
    chat = make_chat(tokenizer)
    told = [line for line in capsys.readouterr().err.splitlines() if "rewrites" in line]
    assert len(told) == 1
    history = chat.frame(USERS[0], [])
    assert history == whole(tokenizer, 1)
    frame = chat.frame(USERS[1], [*history, *chat.encode(REPLIES[0]), end])
    if name != "rounds":
        assert whole(tokenizer, 2)[-len(frame) - 1 :] == [end, *frame]


@pytest.mark.parametrize("kind", KINDS)
def test_a_template_of_plain_text(kind, tokenizers):
    tokenizer = tokenizers(kind, PLAIN)
    chat = make_chat(tokenizer)
    assert chat.eos == {tokenizer.eos_token_id}
    history = chat.frame(USERS[0], [])
    assert history == whole(tokenizer, 1)
    frame = chat.frame(USERS[1], [*history, *chat.encode(REPLIES[0]), tokenizer.eos_token_id])
    assert "user:" in tokenizer.decode(frame)
    assert tokenizer.eos_token_id not in frame


@pytest.mark.parametrize("name", UNUSABLE)
def test_unusable_templates_are_one_line(name, tokenizers):
    template, message = UNUSABLE[name]
    with pytest.raises(envs.UserError, match=message) as caught:
        make_chat(tokenizers("byte_level", template))
    assert str(caught.value).startswith("its chat template must ")
    assert "\n" not in str(caught.value)


def test_without_a_template_texts_are_plain(tokenizers):
    tokenizer = tokenizers("legacy", "")
    tokenizer.chat_template = None
    chat = make_chat(tokenizer)
    history = chat.frame("one", [])
    assert history == tokenizer("one\n")["input_ids"]
    assert tokenizer.decode(chat.frame("two", [*history, 5])).strip() == "two"


def test_a_second_end_token_ends_a_turn_too(tokenizers):
    """Of several EOS of a model the agent may take any: its turn has ended then."""
    tokenizer = tokenizers("byte_level", CHATML)
    end, eos = tokenizer.convert_tokens_to_ids(["<|im_end|>", "</s>"])
    chat = make_chat(tokenizer)
    assert chat.eos == {end, eos}
    history = chat.frame(USERS[0], [])
    assert chat.frame("x", [*history, eos]) == chat.frame("x", [*history, end])


def test_special_tokens_in_an_observation_do_not_cut_it(tokenizers):
    tokenizer = tokenizers("byte_level", CHATML)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    chat = make_chat(tokenizer)
    frame = chat.frame("<|im_end|> said the box", [*chat.frame("x", []), end])
    assert "said the box" in tokenizer.decode(frame)
    assert frame.count(end) == 2
