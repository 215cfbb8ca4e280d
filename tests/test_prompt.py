"""Chat templates and token-faithful history: splicing, BOS, refusals, the sandbox."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.engines.fake_engine import FakeVocab
from actors.errors import InvalidRequest, ModelUnavailable
from actors.prompt import ChatTemplate, EmittedReply, common_prefix
from actors.turn import Message

BOS = 256


class BosVocab(FakeVocab):
    """FakeVocab with a BOS token, written `<s>` in text."""

    specials = ("<s>", *FakeVocab.specials)

    def __init__(self, template: str, *, add_bos: bool = True) -> None:
        super().__init__()
        self.bos, self.bos_text, self.add_bos = BOS, "<s>", add_bos
        self.chat_template = template


def template_of(source: str) -> ChatTemplate:
    vocab = FakeVocab()
    vocab.chat_template = source
    return ChatTemplate(vocab)


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def emitted(text: str, tail: str = "") -> EmittedReply:
    """A reply whose ids are not the tokenizer's own: capital letters stand for small ones."""
    return EmittedReply(tuple(text.upper().encode()), text, tail)


PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"


# ---- BOS


def test_bos_comes_once_where_the_template_writes_none() -> None:
    vocab = BosVocab(PLAIN)
    ids = ChatTemplate(vocab).encode([user("hi")], ())
    assert ids == [BOS, *vocab.tokenize("[user]hi[assistant]")]


def test_bos_comes_once_where_the_template_writes_it() -> None:
    vocab = BosVocab("{{ bos_token }}" + PLAIN)
    ids = ChatTemplate(vocab).encode([user("hi")], ())
    assert ids == [BOS, *vocab.tokenize("[user]hi[assistant]")]


def test_no_bos_where_the_model_wants_none() -> None:
    vocab = BosVocab(PLAIN, add_bos=False)
    assert ChatTemplate(vocab).encode([user("hi")], ())[0] != BOS


@pytest.mark.parametrize("source", [PLAIN, "{{ bos_token }}" + PLAIN])
def test_a_spliced_prompt_has_one_bos(source: str) -> None:
    template = ChatTemplate(BosVocab(source))
    reply = emitted("hello")
    ids = template.encode([user("hi"), assistant("hello"), user("and?")], [reply])
    assert ids.count(BOS) == 1
    assert ids[0] == BOS
    assert bytes(reply.ids) in bytes(i for i in ids if i < 256)


# ---- splicing


def text(ids: list[int]) -> bytes:
    vocab = FakeVocab()
    return b"".join(vocab.token_bytes(i) or b"|" for i in ids)


def test_emitted_ids_stand_where_their_text_stands() -> None:
    template = template_of(PLAIN)
    messages = [user("one"), assistant("first"), user("two"), assistant("second"), user("three")]
    ids = template.encode(messages, [emitted("first"), emitted("second")])
    assert text(ids) == b"[user]one[assistant]FIRST[user]two[assistant]SECOND[user]three[assistant]"


def test_text_that_was_not_emitted_is_tokenized() -> None:
    template = template_of(PLAIN)
    messages = [user("one"), assistant("first, edited"), user("two"), assistant("second")]
    ids = template.encode(messages, [emitted("first"), emitted("second")])
    assert text(ids) == b"[user]one[assistant]first, edited[user]two[assistant]SECOND[assistant]"


def test_a_users_words_are_never_taken_for_a_reply() -> None:
    ids = template_of(PLAIN).encode([user("first"), assistant("first")], [emitted("first")])
    assert text(ids) == b"[user]first[assistant]FIRST[assistant]"


def test_equal_replies_keep_their_order() -> None:
    replies = [EmittedReply((65,), "a", ""), EmittedReply((66,), "a", "")]
    messages = [user("x"), assistant("a"), user("y"), assistant("a")]
    ids = template_of(PLAIN).encode(messages, replies)
    assert text(ids) == b"[user]x[assistant]A[user]y[assistant]B[assistant]"


def test_a_reply_is_not_used_twice() -> None:
    messages = [user("x"), assistant("a"), user("y"), assistant("a")]
    ids = template_of(PLAIN).encode(messages, [EmittedReply((65,), "a", "")])
    assert text(ids) == b"[user]x[assistant]A[user]y[assistant]a[assistant]"


def test_a_cut_replys_tail_follows_its_ids_as_text() -> None:
    ids = template_of(PLAIN).encode([user("x"), assistant("abcd")], [emitted("ab", "cd")])
    assert text(ids) == b"[user]x[assistant]ABcd[assistant]"


def test_an_empty_reply_is_no_reply() -> None:
    ids = template_of(PLAIN).encode([user("x"), assistant(""), user("y")], [emitted("")])
    assert text(ids) == b"[user]x[assistant][user]y[assistant]"


@pytest.mark.parametrize("content", [None, [{"type": "text", "text": "first"}]])
def test_content_that_is_no_string_is_no_reply(content: object) -> None:
    message = {"role": "assistant", "content": content}
    ids = template_of(PLAIN).encode([user("x"), message], [emitted("first")])
    assert b"FIRST" not in text(ids)


@pytest.mark.parametrize(
    "rewrites",
    [
        "{{ m.content | trim }}",
        "{{ m.content.split('</think>')[-1] }}",
        "{{ m.content | replace('first', 'FIRST!') }}",
        "{{ m.content }}{{ m.content }}",
        "{% if m.content|length < 20 %}{{ m.content }}{% else %}long{% endif %}",
        "{% if not m.role == 'assistant' %}{{ m.content }}{% endif %}",
    ],
)
def test_a_template_that_rewrites_replies_gives_the_plain_prompt(rewrites: str) -> None:
    template = template_of("{% for m in messages %}[{{ m.role }}]" + rewrites + "{% endfor %}")
    reply = emitted("<think>hm</think> first ")
    messages = [user("one"), assistant(reply.text), user("two")]
    assert template.encode(messages, [reply]) == FakeVocab().tokenize(template.render(messages))


def test_a_mark_cannot_be_forged() -> None:
    """Whatever a user writes, only the reply's own place gets the ids."""
    message = user("\ue0000000000000000000.0\ue001")
    ids = template_of(PLAIN).encode([message, assistant("first")], [emitted("first")])
    assert text(ids).count(b"FIRST") == 1
    assert text(ids).endswith(b"[assistant]FIRST[assistant]")


words = st.text(alphabet="ab [<", max_size=6)


@given(st.lists(st.tuples(words, words, st.booleans()), max_size=4), words)
def test_the_prompts_text_is_the_template_of_the_messages(
    turns: list[tuple[str, str, bool]], last: str
) -> None:
    template = ChatTemplate(FakeVocab())
    messages, replies = [], []
    for question, answer, known in turns:
        messages += [user(question), assistant(answer)]
        if known:
            replies.append(EmittedReply(tuple(answer.encode()), answer, ""))
    messages.append(user(last))
    assert template.encode(messages, replies) == FakeVocab().tokenize(template.render(messages))


# ---- refusals


@pytest.mark.parametrize("source", [PLAIN, "{{ bos_token }}" + PLAIN])
def test_the_opening_is_what_conversations_of_one_system_prompt_share(source: str) -> None:
    template = ChatTemplate(BosVocab(source))
    system: Message = {"role": "system", "content": "be kind"}
    messages = [system, user("hi"), assistant("ho"), user("and?")]
    prompt = template.encode(messages, [emitted("ho")])
    n = template.opening(messages, prompt)
    assert n == 1 + len("[system]be kind[user]")
    assert template.encode([system, user("else")], ())[:n] == prompt[:n]
    assert template.opening(messages[1:], template.encode(messages[1:], ())) == 0


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].content.nothing.here }}",
        "{{ messages[0].content + 1 }}",
        "{{ 1 // 0 }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ messages | tojson(indent='x', nothing=1) }}",
    ],
)
def test_a_template_that_fails_refuses_the_messages(source: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        template_of(source).render([user("hi")])
    assert caught.value.param == "messages"


def test_the_reason_a_template_gives_is_told() -> None:
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        template_of("{{ raise_exception('roles must alternate') }}").render([user("hi")])


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__globals__['datetime'] }}",
        "{{ strftime_now.__code__.co_consts }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{{ messages | attr('__class__') | attr('__mro__') | list }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'system'}) }}",
        "{% set x = messages[0].pop('role') %}",
    ],
)
def test_the_sandbox_keeps_a_template_from_python(source: str) -> None:
    messages = [user("hi")]
    try:
        shown = template_of(source).render(messages)
    except InvalidRequest:
        shown = ""
    assert shown in ("", "[]")
    assert messages == [user("hi")]


@pytest.mark.parametrize("source", ["", "{% for m in messages %}", "{{ m | no_such_filter }}"])
def test_a_model_without_a_sound_template_is_refused(source: str) -> None:
    with pytest.raises(ModelUnavailable):
        template_of(source)


def test_what_templates_of_the_wild_use() -> None:
    source = (
        "{%- set ns = namespace(n=0) -%}\n"
        "{%- for m in messages -%}{%- if ns.n == 2 -%}{%- break -%}{%- endif -%}"
        "{%- set ns.n = ns.n + 1 -%}{{ m['content'] | trim }};"
        "{%- endfor -%}{{ ns.n }} {{ strftime_now('%Y') | length }} "
        "{{ {'é': [1]} | tojson }}{% if tools %}tools{% endif %}"
    )
    assert template_of(source).render([user(" a "), user("b"), user("c")]) == 'a;b;2 4 {"é": [1]}'


# ---- matching


@given(st.lists(st.integers(0, 2), max_size=8), st.lists(st.integers(0, 2), max_size=8))
def test_common_prefix(a: list[int], b: list[int]) -> None:
    n = common_prefix(a, b)
    assert a[:n] == b[:n]
    assert n == min(len(a), len(b)) or a[n] != b[n]
