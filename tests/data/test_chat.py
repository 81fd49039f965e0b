"""Chat templates: what they may say, where they are found, and how they fail."""

import json
from datetime import datetime

import pytest

from scalabl_ref.data.chat import FIXED, ChatTemplate
from scalabl_ref.data.tokenizer import companion_files, load_tokenizer, tokenizer_files
from scalabl_ref.support.errors import InputError

from ..models import tiny_folder

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Is 2 even?\n"},
    {"role": "assistant", "content": "<yes> & é漢🙂"},
    {"role": "user", "content": "And 3?"},
]

# In the manner of Mistral's: a system message within the first question, turns that alternate.
BRACKETS = """{{ bos_token }}
{%- if messages[0].role == 'system' %}
    {%- set system, turns = messages[0].content, messages[1:] %}
{%- else %}
    {%- set turns = messages %}
{%- endif %}
{%- for message in turns %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('questions and answers must take turns') }}
    {%- endif %}
    {%- if message.role == 'user' %}
        {{- '[Q] ' + (system + '\\n\\n' if loop.last and system is defined else '') }}
        {{- message.content + ' [/Q]' }}
    {%- else %}
        {{- ' ' + message.content | trim + eos_token }}
    {%- endif %}
{%- endfor %}"""

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def render(source, messages=TALK, prompt=True, special=SPECIAL, **variables):
    return ChatTemplate(source, "file.jinja", special).render(messages, prompt, **variables)


def test_a_conversation():
    assert render(BRACKETS) == (
        "<s>[Q] Is 2 even?\n [/Q] <yes> & é漢🙂</s>[Q] Be brief.\n\nAnd 3? [/Q]"
    )
    assert render(BRACKETS, TALK[1:2]) == "<s>[Q] Is 2 even?\n [/Q]"


@pytest.mark.parametrize(
    "source, expected",
    [
        ("{{ messages|length }}", "4"),
        ("{{ eos_token }}{{ unk_token }}|", "</s>|"),  # what is not there is empty
        ("{% if add_generation_prompt %}Answer:{% endif %}", "Answer:"),
        ("  {% if true %}\nx\n  {% endif %}\ny\n", "x\ny"),  # trim_blocks, lstrip_blocks
        ("{% for m in messages %}{{ m['role'] }}{% break %}{% endfor %}", "system"),
        (
            "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}"
            "{{ loop.index }}{% endfor %}",
            "234",
        ),
        ("{{ messages[2] | tojson }}", '{"role": "assistant", "content": "<yes> & é漢🙂"}'),
        ("{{ [1, {'b': 2}] | tojson(indent=1) }}", '[\n 1,\n {\n  "b": 2\n }\n]'),
        ("{{ messages[2].content }}", "<yes> & é漢🙂"),  # no HTML
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
         "{% endfor %}{{ ns.n }}", "4"),
        ("{% if tools is none and documents is none %}none{% endif %}", "none"),
        ("{% macro f(m) %}[{{ m.role }}]{% endmacro %}{{ f(messages[1]) }}", "[user]"),
        ("a{% generation %}b{{ messages|length }}{% endgeneration %}c", "ab4c"),
        ("{{ enable_thinking }} {{ date_string }}", "False 26 Jul 2024"),
    ],
)  # fmt: skip
def test_what_templates_may_say(source, expected):
    assert render(source, **FIXED) == expected


def test_without_generation_prompt():
    source = "x{% if add_generation_prompt %}Answer:{% endif %}"
    assert render(source, prompt=False) == "x"


def test_the_clock():
    before = datetime.now()
    said = render("{{ strftime_now('%Y-%m-%dT%H:%M:%S.%f') }}")
    assert before <= datetime.strptime(said, "%Y-%m-%dT%H:%M:%S.%f") <= datetime.now()


def test_variables_go_before_special_tokens_and_messages_before_all():
    assert render("{{ bos_token }}", bos_token="[") == "["
    assert render("{{ messages|length }}", messages=TALK[:1]) == "1"


@pytest.mark.parametrize(
    "source, message",
    [
        (BRACKETS, "questions and answers must take turns"),
        ("{{ messages[0].name.first }}", "has no attribute 'name'"),
        ("{{ messages.__class__.__mro__ }}", "access to attribute '__class__' .* is unsafe"),
        ("{{ messages.append(1) }}", "access to attribute 'append' .* is unsafe"),
        ("{{ messages[0].pop('role') }}", "access to attribute 'pop' .* is unsafe"),
        ("{{ 1 + 'a' }}", "unsupported operand"),
        ("{% include 'other' %}", "no loader for this environment"),
        ("{% for i in range(10**6) %}{% endfor %}", "Range too big"),
        ("{% for i in range(99999) %}{{ 'x' * 999 }}{% endfor %}", "more than 10,000,000 char"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ [] | first | nothing }}", "No filter named 'nothing'"),
        ("{% for m in messages %}", "Unexpected end of template"),
        ("{{ raise_exception('a\nb' * 99) }}", "ab|a b"),
        ("{{ raise_exception('') }}", "fails: TemplateError$"),
    ],
)
def test_a_template_that_fails_is_one_line(source, message):
    with pytest.raises(InputError, match=message) as caught:
        render(source, TALK[1:] + TALK[1:])
    said = str(caught.value)
    assert said.startswith("file.jinja: its chat template fails: ")
    assert "\n" not in said and len(said) <= 200


def test_values_that_json_has_not():
    with pytest.raises(InputError, match="f: its chat template fails: it is given a value that"):
        ChatTemplate("x", "f").render([], tools={1, 2})


# --- where templates are -----------------------------------------------------------------------


def config(path, chat_template):
    (path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": chat_template, "eos_token": "</s>"})
    )


def said(path):
    return ChatTemplate.load(path, {"eos_token": "</s>"}).render([])


def test_a_folder_without_a_template(tmp_path):
    assert ChatTemplate.load(tmp_path) is None
    config(tmp_path, None)
    assert ChatTemplate.load(tmp_path) is None


def test_places_of_templates(tmp_path):
    config(tmp_path, "config {{ eos_token }}")
    assert said(tmp_path) == "config </s>"
    several = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    config(tmp_path, several)
    assert said(tmp_path) == "plain"
    (tmp_path / "chat_template.jinja").write_text("file é\n", encoding="utf-8")
    assert said(tmp_path) == "file é"
    (tmp_path / "tokenizer_config.json").unlink()
    assert said(tmp_path) == "file é"


def test_a_template_comes_with_the_tokenizer(tmp_path):
    folder = tiny_folder(tmp_path / "model")
    config(folder, "{{ eos_token }}")
    (folder / "chat_template.jinja").write_text("{{ eos_token }}.")
    tokenizer = load_tokenizer(folder)
    assert tokenizer.files == tokenizer_files(folder)
    assert companion_files(folder)["chat_template.jinja"] == folder / "chat_template.jinja"
    assert ChatTemplate.load(tokenizer.files, tokenizer.special).render([]) == "</s>."


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("tokenizer_config.json", "{", "not JSON"),
        ("tokenizer_config.json", "[" * 100_000, "not JSON"),
        ("tokenizer_config.json", "[]", "expected a chat_template that is a text"),
        ("tokenizer_config.json", '{"chat_template": 3}', "expected a chat_template that is a te"),
        ("tokenizer_config.json", '{"chat_template": []}', "expected a chat_template that is a te"),
        ("tokenizer_config.json", '{"chat_template": ["x"]}', "expected a chat_template that is a"),
        (
            "tokenizer_config.json",
            '{"chat_template": [{"name": "default", "template": null}, {"name": "x"}]}',
            "expected a chat_template that is a text",
        ),
        ("tokenizer_config.json", '{"chat_template": "{% if %}"}', "its chat template fails"),
        ("chat_template.jinja", "{{ 1", "its chat template fails"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=rf"{name}: {message}"):
        ChatTemplate.load(tmp_path)
