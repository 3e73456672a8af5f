"""Chats against transformers: the ids of `apply_chat_template`, the masks of {% generation %}."""

import copy
import subprocess
import sys

import numpy as np
import pytest

from slm.errors import UserError
from slm.prepare.chat import DEFAULT_TEMPLATE, chat_format, end_of_turn, find_template
from slm.prepare.documents import BadRecord, Message, Part
from slm.prepare.encode import Documents, encode_parts
from slm.prepare.encoder import Encoder, encoder_state
from slm.store.tokenizer import EOS

ASSISTANT = ("assistant",)
SPECIAL = ["<s>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Contents are trimmed, and there is no generation prompt: the answer's first space is the model's.
INSTRUCT = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content | trim "
    "+ ' [/INST]' }}{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
INSTRUCT_MARKED = INSTRUCT.replace("{% else %}", "{% else %}{% generation %}").replace(
    "{% endif %}{% endfor %}", "{% endgeneration %}{% endif %}{% endfor %}"
)
# Only the last turn keeps its thoughts, as in the templates of reasoning models.
THOUGHTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and "
    "loop.last %}{{ '[think]\n\n[/think]' }}{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHAT = [
    Message("user", " What is \u00e9? "),
    Message("assistant", "A letter. \U0001f600"),
    Message("user", "\u00fc and more?"),
    Message("assistant", "\u00e4 too,\n\nthat is all"),
]


@pytest.fixture
def make(tokenizer):
    """make(template) -> a tokenizer with special tokens and that chat template"""

    def go(template: str):
        changed = copy.deepcopy(tokenizer)
        changed.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": SPECIAL[1:]})
        changed.chat_template = template
        return changed

    return go


def encode(tokenizer, chat, roles=ASSISTANT) -> Documents:
    encoded = encode_parts(
        Encoder(encoder_state(tokenizer)), [chat_format(tokenizer).parts(chat, roles)]
    )
    assert encoded.faults == {}
    return encoded


def targets(tokenizer, chat, roles=ASSISTANT) -> list[str]:
    """The runs of targets, as text."""
    encoded = encode(tokenizer, chat, roles)
    edges = np.flatnonzero(np.diff(encoded.masks)) + 1
    runs = zip(np.split(encoded.tokens, edges), np.split(encoded.masks, edges), strict=True)
    return [tokenizer.decode(tokens) for tokens, masks in runs if masks[0]]


@pytest.mark.parametrize(
    ("template", "marked"), [(CHATML, CHATML_MARKED), (INSTRUCT, INSTRUCT_MARKED)]
)
@pytest.mark.parametrize("messages", [CHAT, CHAT[:2]])
def test_ids_and_masks_are_those_of_transformers(make, template, marked, messages):
    tokenizer = make(marked)
    expected = tokenizer.apply_chat_template(
        [message._asdict() for message in messages],
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ids, masks = expected["input_ids"], expected["assistant_masks"]
    if ids[-1] != tokenizer.eos_token_id:  # the template does not end the document itself
        ids, masks = [*ids, tokenizer.eos_token_id], [*masks, 1]
    for text in (marked, template):
        encoded = encode(make(text), messages)
        assert encoded.tokens.tolist() == ids
        assert encoded.masks.tolist() == [bool(mask) for mask in masks]
        assert encoded.num_targets.tolist() == [sum(masks)]


def test_a_turn_is_learned_with_the_token_that_ends_it(make):
    answers = [message.content for message in CHAT[1::2]]
    ends = [f"{answers[0]}<|im_end|>", f"{answers[1]}<|im_end|>", EOS]
    assert targets(make(CHATML), CHAT) == ends
    assert targets(make(INSTRUCT), CHAT) == [f" {answer} {EOS}" for answer in answers]
    assert targets(make(DEFAULT_TEMPLATE), CHAT) == [answer + EOS for answer in answers]


def test_a_document_that_ends_with_a_prompt_has_no_end_to_learn(make):
    assert targets(make(CHATML), CHAT[:3]) == ["A letter. \U0001f600<|im_end|>"]
    assert encode(make(CHATML), CHAT[:3]).tokens[-1] == make(CHATML).eos_token_id


def test_other_roles(make):
    ends = [f"{message.content}<|im_end|>" for message in CHAT]
    assert targets(make(CHATML), CHAT, ("user",)) == ends[::2]
    assert targets(make(CHATML_MARKED), CHAT, ("user", "assistant")) == [*ends, EOS]


def test_the_default_template_by_hand(make):
    parts = chat_format(make(DEFAULT_TEMPLATE)).parts([Message("system", ""), *CHAT], ASSISTANT)
    eos = make(DEFAULT_TEMPLATE).eos_token_id
    assert parts == (
        Part("<|system|>\n\n<|user|>\n What is \u00e9? \n<|assistant|>\n", False),
        Part("A letter. \U0001f600", True),
        Part("", True, eos),
        Part("\n<|user|>\n\u00fc and more?\n<|assistant|>\n", False),
        Part("\u00e4 too,\n\nthat is all", True),
        Part("", True),
    )


def test_what_spells_a_special_token_in_a_content_is_text(make):
    tokenizer = make(CHATML)
    chat = [Message("user", "a<|im_end|>"), Message("assistant", f"<|im_start|>{EOS} b")]
    encoded = encode(tokenizer, chat)
    ids = encoded.tokens.tolist()
    start, end, eos = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", EOS])
    assert (ids.count(start), ids.count(end), ids.count(eos)) == (2, 2, 1)
    assert tokenizer.decode(ids) == (
        "<|im_start|>user\na<|im_end|><|im_end|>\n"
        f"<|im_start|>assistant\n<|im_start|>{EOS} b<|im_end|>\n{EOS}"
    )
    assert encoded.sizes[encoded.tokens == end].tolist() == [0, 0]
    assert (
        encoded.sizes.sum()
        == encoded.num_bytes[0]
        == len(f"user\na<|im_end|>\nassistant\n<|im_start|>{EOS} b\n")
    )


def test_what_the_template_adds_behind_the_generation_prompt_is_the_models(make):
    answers = [message.content for message in CHAT[1::2]]
    expected = [f"{answers[0]}<|im_end|>", f"[think]\n\n[/think]{answers[1]}<|im_end|>", EOS]
    assert targets(make(THOUGHTS), CHAT) == expected


def test_special_tokens_that_swallow_white_space(make):
    from tokenizers import AddedToken

    tokenizer = make(CHATML.replace("im_", "x_"))
    swallow = [AddedToken(f"<|x_{n}|>", special=True, rstrip=True) for n in ("start", "end")]
    tokenizer.add_special_tokens({"additional_special_tokens": swallow})
    ids = tokenizer.apply_chat_template([message._asdict() for message in CHAT], return_dict=True)[
        "input_ids"
    ]
    assert encode(tokenizer, CHAT).tokens.tolist() == [*ids, tokenizer.eos_token_id]


@pytest.mark.parametrize(
    ("template", "chat", "reason"),
    [
        ("{{ raise_exception('no system') }}", CHAT, "is refused by the chat template: no system"),
        ("{{ messages[9].content }}", CHAT, "is refused by the chat template: list object has no"),
        ("{{ messages[0].role + 1 }}", CHAT, "is refused by the chat template: can only conc"),
        ("{{ strftime_now('%Y') }}", CHAT, "'strftime_now' is undefined"),
        ("{{ messages[0].content }}", CHAT, "has 2 messages of assistant, .* template shows 0"),
        ("{{ messages[1].content | upper }}{{ messages[3].content }}", CHAT, "in other words"),
        (CHATML, [Message("assistant", "a\ufdd0")], "U.FDD0 to U.FDD3"),
    ],
)
def test_what_a_template_does_not_show_is_a_bad_record(make, template, chat, reason):
    with pytest.raises(BadRecord, match=reason):
        chat_format(make(template)).parts(chat, ASSISTANT)


def test_which_template_is_taken(make, tokenizer, tmp_path, caplog):
    file = tmp_path / "own.jinja"
    file.write_text("{{ messages }}")
    assert find_template(make(CHATML), str(file)) == "{{ messages }}"
    assert find_template(make(CHATML), None) == CHATML
    assert find_template(None, None) == find_template(tokenizer, None) == DEFAULT_TEMPLATE
    several = make(CHATML)
    several.chat_template = {"rag": CHATML, "tool_use": CHATML}
    with pytest.raises(UserError, match="multiple chat templates.*; set tokenizer.chat_template"):
        find_template(several, None)
    file.write_text("\n{% for m in %}")
    with pytest.raises(UserError, match=r"chat template, .*own.jinja, line 2: "):
        find_template(None, str(file))
    with pytest.raises(UserError, match="tokenizer.chat_template is .*none.jinja, it cannot be"):
        find_template(None, str(tmp_path / "none.jinja"))


def test_a_worker_without_chats_imports_neither_jinja_nor_torch():
    names = "{'jinja2', 'torch', 'transformers'}"
    code = f"import sys, slm.prepare.workers; print(*{names} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("template", [CHATML, CHATML_MARKED, THOUGHTS])
def test_the_end_of_a_turn_is_the_special_token_that_ends_an_answer(make, template):
    tokenizer = make(template)
    assert end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")


@pytest.mark.parametrize("template", [None, DEFAULT_TEMPLATE, INSTRUCT, "{{ raise_exception() }}"])
def test_where_eos_ends_a_turn_or_nothing_does_there_is_no_other_end(make, template):
    assert end_of_turn(make(template)) is None
