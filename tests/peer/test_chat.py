"""Chat templates against transformers' apply_chat_template, on two hundred conversations each."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import tokenizers

from scalabl_ref.data import ChatTemplate
from scalabl_ref.data.chat import FIXED
from scalabl_ref.support.errors import InputError

from ..data.test_chat import BRACKETS
from ..data.test_tokenizer import byte_level, folder

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("default")]
transformers = pytest.importorskip("transformers")

WORDS = (
    *("Hello", " there", "\n", "  ", "\t", "\r\n", "é漢字", "🙂", "A. yes\nB. no", "Answer:"),
    *("<s>", "<|im_end|>", "</think>", "<think>", "{{ x }}", "{% if %}", '"said"', "<b>&amp;</b>"),
)

# In the manner of those with a default system message, a date, tools, and a draft before answers.
BLOCKS = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages if message.role == "user" %}
    {%- set ns.last = loop.index0 %}
{%- endfor %}
{%- if messages[0]["role"] == "system" %}
    {%- set system = messages[0]["content"] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = "Be of use." %}
{%- endif %}
<|system|>{{ system }} ({{ date_string }}, {{ ns.last }})
{% for message in messages %}
{% set content = message.content.split("</think>")[-1].lstrip("\\n") if message.content is string %}
<|{{ message["role"] }}|>{{ content }}{{ message | tojson }}
{% generation %}
  {{ eos_token if message.role == "assistant" }}
{% endgeneration %}
{% endfor %}
{% if add_generation_prompt %}
<|assistant|>
{% if enable_thinking is defined and enable_thinking is false %}
<think></think>
{% endif %}
{% endif %}
"""


def conversations(count: int = 200) -> Iterator[tuple[list[dict[str, str]], bool]]:
    """Messages and whether an answer is asked for; always the same, of all kinds."""
    draw = random.Random(0)

    def message(role: str) -> dict[str, str]:
        return {"role": role, "content": "".join(draw.choices(WORDS, k=draw.randint(0, 8)))}

    for _ in range(count):
        messages = [message("system")] if draw.random() < 0.5 else []
        for _ in range(draw.randint(1, 4)):
            messages += [message("user"), message("assistant")]
        if draw.random() < 0.6:
            messages.pop()
        yield messages, draw.random() < 0.5


def assert_same_chats(template: ChatTemplate, tokenizer, refused: int = 0, **variables) -> None:
    """The template's text is transformers', but where both refuse: `refused` of 200."""
    different, failed = [], 0
    for messages, prompt in conversations():
        try:
            theirs = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompt, **variables
            )
        except Exception:  # jinja2's, which the package leaves as it is
            failed += 1
            with pytest.raises(InputError, match="its chat template fails"):
                template.render(messages, prompt, **variables)
            continue
        ours = template.render(messages, prompt, **variables)
        if ours != theirs:
            different.append((messages, ours, theirs))
    assert different == [] and failed == refused


@pytest.mark.parametrize("variables", [{}, FIXED], ids=["plain", "fixed"])
@pytest.mark.parametrize("source", [BRACKETS, BLOCKS], ids=["brackets", "blocks"])
@pytest.mark.parametrize("place", ["config", "list", "file"])
def test_two_hundred_conversations(tmp_path, source, place, variables):
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    if place == "config":
        config["chat_template"] = source
    if place == "list":
        config["chat_template"] = [
            {"name": "other", "template": "no"},
            {"name": "default", "template": source},
        ]
    folder(tmp_path, byte_level(), **config)
    if place == "file":
        (tmp_path / "chat_template.jinja").write_text(source, encoding="utf-8")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert_same_chats(ChatTemplate.load(tmp_path, special), theirs, **variables)


def test_conversations_that_a_template_refuses():
    """In the manner of Mistral's first: no system message, and turns that alternate."""
    source = BRACKETS.replace("messages[0].role == 'system'", "false")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(byte_level()),
        bos_token="<s>",
        eos_token="</s>",
        chat_template=source,
    )
    ours = ChatTemplate(source, Path("t.jinja"), theirs.special_tokens_map)
    system = sum(messages[0]["role"] == "system" for messages, _ in conversations())
    assert 0 < system < 200
    assert_same_chats(ours, theirs, refused=system)
