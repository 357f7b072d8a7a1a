"""Chat templates are programs: hostile ones end soon, as one sentence or as a text of bounded size."""

import resource
from contextlib import suppress

import pytest

from keifu.data.tokenizers.chat_template import CHATML, render
from keifu.errors import UserError

TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
NESTED = "{% set ns=namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x=[ns.x,ns.x] %}{% endfor %}"
DOUBLED = (
    "{% set ns=namespace(s='aaaaaaaaaa') %}{% for i in range(90) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ns.s}}"
)
LOOP = "{% for a in range(99999) %}"
LOOPS = LOOP * 3 + "{% endfor %}" * 3
REFUSED = [
    NESTED + "{{ ns.x|tojson }}", DOUBLED, DOUBLED.replace("+", "~"), LOOPS, "{{ 'a'*10**9 }}", "{{ 10**9**10**9 }}",
    "{{ 9**9**9 }}", "{{ messages|tojson(indent=10**9) }}", "{% break %}", "{{ 'a'|center(1000000000) }}",
    "{{ 'a'.center(1000000000) }}", "{{ '{:1000000000}'.format(1) }}", "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (1000000000, 1) }}", "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(200) }}",
    "{{ " + "(" * 5000 + ")" * 5000 + " }}", "{% set s='a'*9000000 %}{{ s.replace('a', s) }}",
    "{% set s='a'*9000000 %}{{ s|replace('a', s) }}", "{{ range(10**12)|list }}", "{{ 1/0 }}",
    "{{ (1).to_bytes(10**10,'big') }}", "{{ 'a'|indent(10**9, true) }}", "{{ messages|batch(1000000000, 1)|list }}",
]  # fmt: skip


@pytest.mark.parametrize("template", REFUSED, ids=[str(number) for number in range(len(REFUSED))])
def test_a_hostile_template_is_refused(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keifu.data.tokenizers.chat_template.SECONDS", 0.5)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError):
        render(template, TALK, True, {})
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "kilobytes"


@pytest.mark.parametrize("template", ["{{ ''.__class__.__mro__ }}", "{{ cycler.__init__.__globals__ }}"])
def test_the_sandbox_shows_no_insides(template: str) -> None:
    with suppress(UserError):
        assert render(template, TALK, True, {}).strip() == ""


def test_a_usual_template_is_rendered() -> None:
    assert render(CHATML, TALK, True, {}).count("<|im_start|>") == 3
