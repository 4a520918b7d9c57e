"""Writes tests/golden/jinja_snippets.json: template snippets and what transformers renders from them.

Needs: pip install transformers==5.23.0 jinja2. Run from the repository root.
"""
import json

import jinja2
import transformers
from transformers.utils.chat_template_utils import render_jinja_template

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi é 你好"},
    {"role": "assistant", "content": "Hello", "tool_calls": [{"function": {"name": "f", "arguments": {"b": 1, "a": [1.5, None, True]}}}]},
    {"role": "tool", "content": "{\"t\": 21}"},
]
VARIABLES = {
    "s": "Hello World",
    "u": "straße ÉÈ ǆ 你好",
    "e": "",
    "ml": "one\n  two\n\nthree\r\nfour",
    "n": 7,
    "neg": -7,
    "f": 2.5,
    "big": 123456789012,
    "z": 0,
    "t": True,
    "fa": False,
    "no": None,
    "l": [3, 1, 2],
    "ls": ["b", "A", "c"],
    "le": [],
    "d": {"b": 1, "a": {"x": [1, 2]}, "items": "it", "C": None},
    "de": {},
    "recs": [{"n": "x", "v": 2, "g": "p"}, {"n": "Y", "v": 1, "g": "q"}, {"n": "z", "v": 2, "g": "p"}],
    "quote": "it's \"q\" <b> & \\ \t",
    "schema": {"type": "object", "properties": {"city": {"type": "string", "enum": ["a", "b"]}, "n": {"type": ["integer", "null"]}}, "required": ["city"]},
}

EXPRESSIONS = r"""
s
u
no
t
f
1.0
1e20
1e16
123456789.123
0.1 + 0.2
1e-5
0.0001
-0.0
1/3
100000000000000000.0
l
ls
d
de
le
recs
(1,)
(1, 2)
()
[1, 'a', none, 2.5, [true]]
{'a': 1, 2: 'b'}
quote
[quote]
['it\'s']
["a\nb\t\x01\u200b\u00e9"]
undefined_thing
[undefined_thing]
undefined_thing.x
undefined_thing is defined
undefined_thing | default('D')
e | default('D')
e | default('D', true)
no | default('D')
no | default('D', boolean=true)
d.missing
d.missing.more
d.missing | default('x')
d.b
d['b']
d.a.x[1]
d.a.x.1
d.items
d['items']
d.items()
d.items() | list
d.keys()
d.values()
d.keys() | list
d | list
d | length
d | items | list
d | dictsort
d.get('b')
d.get('q')
d.get('q', 5)
d.update({'a': 1})
l.append(4)
l.pop()
l.index(1)
l.count(1)
l[0]
l[-1]
l[5]
l[5] is defined
l[1:]
l[:-1]
l[::-1]
l[::2]
s[0]
s[-1]
s[1:4]
s[::-1]
u[0]
u[-2:]
u[4]
s[100]
s['upper']()
s.upper()
s.lower()
u.upper()
u.lower()
u.title()
u | title
u | capitalize
s.title()
'hello wORLD foo-bar (baz)'.title()
'hello wORLD foo-bar (baz)' | title
s.swapcase()
s.capitalize()
s | upper
s | lower
s.split()
s.split('o')
s.split('o', 1)
s.rsplit('o', 1)
'  a  b '.split()
'  a  b '.split(' ')
'  a  b c '.split(none, 1)
'  a  b c '.rsplit(none, 1)
'a,b,c'.split(',', 0)
s.split('')
ml.splitlines()
ml.splitlines(true)
'xxabcxx'.strip('x')
'xxabcxx'.lstrip('x')
'xxabcxx'.rstrip('x')
'  a\n '.strip() + '|'
'  a\n ' | trim
'xxaxx' | trim('x')
s.startswith('Hell')
s.startswith(('a', 'H'))
s.endswith('ld')
s.startswith('W', 6)
s.replace('o', '0')
s.replace('o', '0', 1)
s.replace('', '-')
s | replace('o', '0')
s | replace('o', '0', 1)
s.find('o')
s.find('q')
s.rfind('o')
s.index('q')
u.find('你')
s.count('o')
'-'.join(ls)
'-'.join(l)
ls | join('-')
l | join('-')
l | join
recs | join(',', attribute='n')
recs | map(attribute='n') | join(',')
recs | map(attribute='q', default='?') | join(',')
ls | map('upper') | list
ls | map('replace', 'b', 'X') | list
recs | map(attribute='n')
recs | selectattr('g', 'equalto', 'p') | map(attribute='n') | list
recs | selectattr('v', '>', 1) | list | length
recs | rejectattr('g', 'eq', 'p') | list
recs | selectattr('q') | list
recs | selectattr('q', 'defined') | list
l | select('odd') | list
l | reject('odd') | list
l | select | list
[0, 1, '', 'a', none] | select | list
l | select('>', 1) | list
l | select('in', [1, 2]) | list
l | sort
l | sort(reverse=true)
ls | sort
ls | sort(case_sensitive=true)
recs | sort(attribute='v') | map(attribute='n') | list
recs | sort(attribute='v,n') | map(attribute='n') | list
[1, 'a'] | sort
l | min
l | max
le | max
ls | max
recs | max(attribute='v')
l | sum
recs | sum(attribute='v')
recs | sum('v', 10)
l | first
l | last
le | first
s | first
s | last
l | reverse | list
l | reverse
s | reverse
l | length
l | count
s | length
u | length
n | length
l | unique | list
['a', 'A', 'b'] | unique | list
recs | groupby('g')
recs | groupby('g') | map(attribute='grouper') | list
recs | groupby('v') | list | length
l | batch(2) | list
l | batch(2, 'x') | list
l | slice(2) | list
l | slice(2, 'x') | list
l | string
d | string
n | string
'12' | int
'12.7' | int
'abc' | int
'abc' | int(5)
'0x1f' | int(base=16)
' 12 ' | int
2.9 | int
'1e3' | float
'x' | float
'x' | float(1.5)
n | float
2.5 | round
3.5 | round
2.675 | round(2)
2.1 | round(0, 'ceil')
2.9 | round(method='floor')
7 | round
1234.5 | round(-2)
neg | abs
-2.5 | abs
s | abs
s | center(20)
'ab'.center(5)
'abc'.center(6)
'a'.ljust(3) + '|'
'a'.rjust(3, '.')
'-5'.zfill(5)
'5'.zfill(3)
ml | indent
ml | indent(2, true)
ml | indent(2, blank=true)
ml | indent('--')
'a\n' | indent + '|'
'foo bar baz qux' | truncate(9)
'foo bar baz qux' | truncate(9, true)
'foo bar baz qux' | truncate(9, false, '!', 0)
'foo bar baz qux' | truncate(11)
'foo bar  baz' | wordcount
'<b>x</b>  y' | striptags
quote | e
quote | escape
quote | urlencode
d | tojson
u | tojson
u | tojson(ensure_ascii=true)
quote | tojson
recs | tojson
schema | tojson(indent=2)
schema | tojson(indent=4)
schema | tojson(sort_keys=true)
d | tojson(separators=(',', ':'))
de | tojson(indent=2)
le | tojson(indent=2)
[1.0, 1e20, 1e-7, none, true, 'a/b'] | tojson
{1: 2, none: 3, true: 4, 1.5: 5} | tojson
(1, 2) | tojson
undefined_thing | tojson
namespace(a=1) | tojson
'\x7f\x1f' | tojson
messages | tojson
messages[2].tool_calls[0].function.arguments | tojson
messages | length
messages[-1].role
messages[1:] | map(attribute='role') | list
1 + 2 * 3
(1 + 2) * 3
2 ** 10
2 ** -1
2 ** 3 ** 2
-2 ** 2
7 // 2
-7 // 2
7 % 3
-7 % 3
7 % -3
7.5 % 2
-7.5 // 2
7 / 2
6 / 2
1 / 0
1 // 0
1 % 0
true + 1
'a' * 3
3 * 'a'
[1] * 2
[1] + [2]
(1,) + (2,)
[1] + (2,)
'a' + 1
'a' ~ 1 ~ none ~ 2.0 ~ [1]
'a' + 'b' | upper
'a' ~ 'b' | upper
-1 | abs
not true
not e
not e and t
t and 'x'
e or 'y'
e or no or 'z'
1 == 1.0
1 == true
'1' == 1
[1, 2] == [1, 2]
(1, 2) == [1, 2]
{'a': 1} == {'a': 1.0}
none == none
undefined_thing == none
1 < 2 < 3
1 < 3 < 2
1 != 2
'a' < 'b'
[1, 2] < [1, 3]
1 < 'a'
none < 1
'ell' in s
'x' not in s
2 in l
'a' in d
'q' in d
1 in s
1 in n
'x' in undefined_thing
'x' if t else 'y'
'x' if fa
'x' if fa else 'y' if no else 'z'
n is odd
n is even
n is divisibleby 7
n is divisibleby(3)
n is number
n is integer
f is float
t is number
t is integer
t is boolean
s is string
d is mapping
l is mapping
l is sequence
d is sequence
s is sequence
n is sequence
l is iterable
s is iterable
n is iterable
undefined_thing is iterable
undefined_thing is sequence
no is none
no is not none
e is defined
n is eq 7
n is gt 5
n is lt(5)
n is in [7, 8]
n is not in [7, 8]
s is lower
'abc' is lower
'ABC' is upper
t is true
fa is false
1 is true
s is sameas s
no is sameas none
range is callable
s is callable
'upper' is filter
'odd' is test
s is nothing
range(5)
range(5) | list
range(1, 10, 3) | list
range(5, 0, -2) | list
range(0)
dict(a=1, b=2)
dict({'x': 1}, y=2)
namespace(a=1).a
namespace(a=1).b
'%s and %d' | format('x', 5)
'%s and %d' % ('x', 5)
'%05.2f|%-5s|%5s|%x|%%' % (3.14159, 'a', 'b', 255)
'%(a)s' % {'a': 1}
'%(a)s' | format(a=2)
'%s' % 5
'%s' % [1, 2]
'%d' % 'x'
'%r' % 'x'
'%+d % d' % (5, 5)
'{} {}'.format(1, 'a')
'{1} {0}'.format(1, 'a')
'{a} {b[0]}'.format(a=1, b=[5])
'{:>5}|{:<5}|{:^5}|'.format('a', 'b', 'c')
'{:05d} {:,} {:.2f} {:x} {:%}'.format(42, 1234567, 3.14159, 255, 0.25)
'{:*^9}'.format('mid')
'{!r}'.format('a')
'{{}}'.format()
'{}'.format()
s.isupper()
'abc'.isalpha()
'12'.isdigit()
'12a'.isalnum()
' '.isspace()
''.isdigit()
'½'.isnumeric()
'abc'.islower()
'abcabc'.removeprefix('abc')
'abcabc'.removesuffix('bc')
'a-b-c'.partition('-')
'a-b-c'.rpartition('-')
'abc'.partition('-')
'a\tb'.expandtabs(4)
'ab'.casefold()
joiner(', ')
1234567 | filesizeformat
1500 | filesizeformat(true)
s | wordwrap(6)
{'a': 'x', 'b': none} | xmlattr
d | pprint
s | attr('upper')
d | attr('b')
0x1F
1_000
0b101
'a' 'b'
"dq" + 'sq'
'\u00e9\x41\n|\q'
[1,2,3,]
{'a':1,}
s.nothing
s.nothing()
n.nothing
d.b()
l | nothing
loop
messages | selectattr('role', 'equalto', 'user') | first
(messages | selectattr('role', 'equalto', 'user') | list)[0].content
messages | map(attribute='content') | map('length') | list
messages | rejectattr('tool_calls', 'defined') | map(attribute='role') | join(' ')
messages[0]['content'] | trim | upper
(messages | last).role
messages[10]
messages[10].role
messages.0.role
[1, 2, 3] | map('string') | join('+')
[[1, 2], [3, 4]] | map('first') | list
[[1, 2], [3, 4]] | map('sum') | list
[{'a': {'b': 1}}] | map(attribute='a.b') | list
{'a': [1, 2]}.a | last
'a' is in 'abc'
'abc' | list
u | list | length
none | string
none | list
5 | list
true | string | lower
'x' | default('y') ~ 'z'
raise_exception('boom')
strftime_now('%%')
s | upper | lower | title | replace('H', 'J')
(s | upper).lower()
s|length > 5 and l|length == 3
not l|length == 3
l == [3,1,2] and d != de
d.a['x'] | join
d['a'].x | sum
recs[0].n ~ recs[-1].v
recs | map('items') | map('list') | list | length
ls | map('upper') | sort | join
1 if l else 2
'%.3f' % 2
'%5.1f|' % 2.25
'%e' % 12345.678
'%g' % 0.00001
'%c' % 65
10 | string | length
[3, 1] + [2] | sort
""".strip("\n").split("\n")

TEMPLATES = [
    "{% for x in l %}{{ loop.index }}:{{ x }}{% if not loop.last %}, {% endif %}{% endfor %}",
    "{% for x in l %}{{ loop.index0 }}{{ loop.revindex }}{{ loop.revindex0 }}{{ loop.first }}{{ loop.length }}{{ loop.depth }} {% endfor %}",
    "{% for x in l %}[{{ loop.previtem }}|{{ x }}|{{ loop.nextitem }}]{% endfor %}",
    "{% for x in l %}{{ loop.cycle('a', 'b') }}{% endfor %}",
    "{% for x in [1, 1, 2] %}{{ loop.changed(x) }}{% endfor %}",
    "{% for x in le %}x{% else %}none{% endfor %}",
    "{% for x in undefined_thing %}x{% else %}none{% endfor %}",
    "{% for x in no %}x{% endfor %}",
    "{% for k, v in d.items() %}{{ k }}={{ v }};{% endfor %}",
    "{% for k in d %}{{ k }}{% endfor %}",
    "{% for c in 'héé' %}{{ c }}-{% endfor %}",
    "{% for a, (b, c) in [(1, (2, 3))] %}{{ a }}{{ b }}{{ c }}{% endfor %}",
    "{% for a, b in [(1, 2, 3)] %}{% endfor %}",
    "{% for x in l if x > 1 %}{{ loop.index }}{{ x }} {% else %}no{% endfor %}",
    "{% for x in l if x > 10 %}{{ x }}{% else %}no{% endfor %}",
    "{% for x in l %}{% if x == 1 %}{% continue %}{% endif %}{{ x }}{% endfor %}",
    "{% for x in l %}{% if x == 1 %}{% break %}{% endif %}{{ x }}{% endfor %}",
    "{% for x in [[1, [2]], [3]] recursive %}{% if x is iterable %}({{ loop(x) }}){% else %}{{ x }}@{{ loop.depth }}{% endif %}{% endfor %}",
    "{% set x = 1 %}{% for y in l %}{% set x = y %}{% endfor %}{{ x }}",
    "{% set ns = namespace(x=1) %}{% for y in l %}{% set ns.x = ns.x + y %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=1, y='a') %}{% set ns.z = [1] %}{{ ns.x }}{{ ns.y }}{{ ns.z }}",
    "{% set d.x = 1 %}",
    "{% set ns = namespace() %}{% set ns._x = 1 %}",
    "{% if t %}{% set q = 5 %}{% endif %}{{ q }}",
    "{% set a, b = 1, 2 %}{{ a }}{{ b }}",
    "{% set a = 1, 2 %}{{ a }}",
    "{% set a %}text {{ n }}{% endset %}[{{ a }}]",
    "{% set a | upper %}text {{ n }}{% endset %}[{{ a }}]",
    "{% set a | upper | trim %} text {{ n }} {% endset %}[{{ a }}]",
    "{% with a=1, b=n %}{{ a }}{{ b }}{% endwith %}{{ a }}",
    "{% with %}{% set q = 1 %}{{ q }}{% endwith %}{{ q }}",
    "{% macro m(a, b=2) %}({{ a }},{{ b }}){% endmacro %}{{ m(1) }}{{ m(1, 3) }}{{ m(b=5, a=4) }}{{ m() }}",
    "{% macro m(a) %}{{ a }}{{ varargs }}{{ kwargs }}{% endmacro %}{{ m(1, 2, 3, x=4) }}",
    "{% macro m(a) %}{{ n }}{{ a }}{% endmacro %}{% set n = 9 %}{{ m(1) }}",
    "{% macro m(a) %}{% if a > 0 %}{{ a }}{{ m(a - 1) }}{% endif %}{% endmacro %}{{ m(3) }}",
    "{% macro m(a=l) %}{{ a }}{% endmacro %}{{ m() | upper }}",
    "{% macro m() %}[{{ caller() }}]{% endmacro %}{% call m() %}body {{ n }}{% endcall %}",
    "{% macro m() %}[{{ caller(1, 'x') }}]{% endmacro %}{% call(a, b) m() %}{{ a }}{{ b }}{% endcall %}",
    "{% macro m() %}{{ caller is defined }}{% endmacro %}{{ m() }}",
    "{% filter upper %}abc {{ s }}{% endfilter %}",
    "{% filter upper | replace('A', 'x') %}abc{% endfilter %}",
    "{% raw %}{{ x }}{% endraw %}",
    "{% raw -%}  {{ x }}  {%- endraw %}|",
    "a {# comment #} b",
    "a {#- comment -#} b",
    "{% if fa %}a{% elif t %}b{% else %}c{% endif %}",
    "{% if fa %}a{% elif no %}b{% else %}c{% endif %}",
    "  {% if t %}\n  x\n  {% endif %}\n  y\n",
    "  {%- if t %}\n  x\n  {%- endif %}\n  y\n",
    "  {%+ if t %}\n  x\n  {%+ endif %}\n  y\n",
    "{% if t -%}\n  x\n{% endif -%}\n  y\n",
    "{% if t +%}\n  x\n{% endif +%}\n  y\n",
    "a\n   {{ n }}\n  b",
    "a\n   {{- n -}}\n  b",
    "a   {{ n }}{{+ n }}",
    "{{ n }}\n",
    "{{ n }}\n\n",
    "{% for x in l %}\n{{ x }}\n{% endfor %}\nend",
    "   {# c #}\n a",
    "\t{% if t %} {% endif %}\r\nx\r\n",
    "x {% if t %}\n\n{% endif %} y",
    "{{ {'a': {'b': 1}}['a']['b'] }}",
    "{{ {'a': {}} }}",
    "{{ '}}' }}{{ \"%}\" }}",
    "{% set x = '{{' %}{{ x }}",
    "{% print n %}",
    "{% do l.append(1) %}",
    "{% block x %}{{ n }}{% endblock %}",
    "{% unknown %}",
    "{% endif %}",
    "{{ n ",
    "{{ n }",
    "{{ }}",
    "{{ 1 2 }}",
    "{% if %}x{% endif %}",
    "{% for x in l %}",
    "{% set x = %}",
    "{% generation %}a{{ n }}{% endgeneration %}",
    "{% for m in messages %}{{ m.role }}{% if m.tool_calls is defined %}!{% endif %} {% endfor %}",
    "{% for m in messages %}{% if 'tool_calls' in m and m['tool_calls'] %}{% for tc in m.tool_calls %}{% set tc = tc.function %}{{ tc.name }}{{ tc.arguments | tojson }}{% endfor %}{% endif %}{% endfor %}",
    "{%- for m in messages if m.role not in ['system', 'tool'] -%}\n{{ m.role }}\n{%- if loop.last %} end{% endif %}\n{%- endfor -%}",
    "{% set g = messages | selectattr('role', 'eq', 'user') %}{{ g | list | length }}{{ g | list | length }}",
    "{% set g = l | map('string') %}{% for x in g %}{{ x }}{% endfor %}{% for x in g %}{{ x }}{% else %}empty{% endfor %}",
    "{% set j = joiner(', ') %}{% for x in l %}{{ j() }}{{ x }}{% endfor %}",
    "{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{{ c.next() }}{{ c.current }}{{ c.reset() }}{{ c.current }}",
    "{% macro typ(spec) %}{% if spec.type is string %}{{ spec.type }}{% elif spec.type is iterable %}{{ spec.type | join('|') }}{% endif %}{% endmacro %}{% for k, v in schema.properties.items() %}{{ k }}: {{ typ(v) }}{{ ' required' if k in schema.required }};{% endfor %}",
    "{% for x in l %}{% for y in ls %}{{ loop.index }}{{ x }}{{ y }}{% endfor %}{{ loop.index }}{% endfor %}",
    "{% for x in l %}{% set outer = loop %}{% for y in ls %}{{ outer.index }}{{ loop.index }} {% endfor %}{% endfor %}",
    "{{ namespace(**{'a': 5}).a }}{{ dict(*[[('k', 1)]]).k }}",
    "{{ range(3) | map('string') | join(',') }}",
    "{% if messages[0]['role'] == 'system' %}{% set sys = messages[0]['content'] %}{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}{{ sys }}{{ rest | length }}",
    "{% set content = messages[1].content.split('é')[0].rstrip('\\n').split(' ')[-1].lstrip('\\n') %}[{{ content }}]",
    "{{- s }}\n{%- if n == 7 %}\n    {{- ' seven' }}\n{%- endif %}",
    "{% for k, v in d | dictsort %}{{ k }}{{ v }}{% endfor %}",
    "{% for g in recs | groupby('g') %}{{ g.grouper }}:{{ g.list | map(attribute='n') | join }};{% endfor %}",
    "{% for k, items in recs | groupby('g') %}{{ k }}{{ items | length }}{% endfor %}",
    "{{ messages[2].tool_calls[0]['function']['arguments'].items() | list }}",
    "{% set x = 5 if undefined_thing else 6 %}{{ x }}",
    "{{ 'a' if undefined_thing is not defined else 'b' }}",
    "{{ undefined_thing or 'x' }}{{ undefined_thing and 'x' }}",
    "{{ undefined_thing ~ 'x' }}",
    "{{ undefined_thing + 'x' }}",
    "{{ undefined_thing | upper }}|{{ undefined_thing | length }}|{{ undefined_thing | list }}",
    "{{ undefined_thing() }}",
    "{{ no.x }}|{{ no.x is defined }}",
    "{{ no + 'x' }}",
    "{{ messages[1].reasoning_content }}|{{ tools is none }}|{{ documents is none }}|{{ add_generation_prompt }}",
    "{% set x %}{% for y in l %}{{ y }}{% endfor %}{% endset %}{{ x | int + 1 }}",
    "{% macro a() %}{% set v = 1 %}{{ v }}{% endmacro %}{{ a() }}{{ v is defined }}",
    "{% if l | length > 2 and (s.startswith('H') or no) %}ok{% endif %}",
    "{% if not (t and fa) %}ok{% endif %}",
    "{{ l[0] if l[0] is defined and l[0] is number else 'x' }}",
    "{{ \"a\\\"b\" }}{{ 'a\\'b' }}{{ 'a\\\\b' }}",
    "{{ ('a', 'b')[1] }}{{ ['a', 'b'][0] }}",
    "{{ (1, 2, 3)[1:] }}",
    "{% set a = [1] %}{% set b = a + [2] %}{{ a }}{{ b }}",
    "{% set ns = namespace(items=[]) %}{% for x in l %}{% set ns.items = ns.items + [x * 2] %}{% endfor %}{{ ns.items | join(' ') }}",
    "{% set ns = namespace(found=false) %}{% for m in messages[::-1] %}{% if not ns.found and m.role == 'user' %}{% set ns.found = true %}{{ loop.index0 }}{% endif %}{% endfor %}",
    "{% call range(3) %}x{% endcall %}",
    "{{ loop.index }}",
    "{% for x in range(3) %}{{ x }}{{ \"\\n\" if not loop.last }}{% endfor %}",
    "{% set a = 'x' %}{% macro m() %}{{ a }}{% endmacro %}{% set a = 'y' %}{{ m() }}",
    "{% for x in l %}{% macro m() %}{{ x }}{% endmacro %}{{ m() }}{% endfor %}",
    "{% autoescape true %}{{ n }}{% endautoescape %}",
]


def render(source):
    try:
        # Python-only keyword: variables are passed as they are in the file.
        text, _ = render_jinja_template([json.loads(json.dumps(MESSAGES))], chat_template=source, **json.loads(json.dumps(VARIABLES)))
        return {"template": source, "rendered": text[0]}
    except Exception as error:  # noqa: BLE001 - every failure is a result
        return {"template": source, "error": type(error).__name__}


def main():
    # Texts that show a Python object say nothing about templates.
    cases = []
    for source in ["{{ " + e + " }}" for e in EXPRESSIONS] + TEMPLATES:
        case = render(source)
        text = case.get("rendered", "")
        if " object " in text or "<function" in text or "<built-in" in text or "<class" in text or " at 0x" in text:
            continue
        cases.append(case)
    out = {"format": "golden-1", "family": "jinja_snippets",
           "doc": "Template snippets rendered with messages and variables by render_jinja_template. error: it raised.",
           "source": {"package": "transformers", "version": transformers.__version__, "license": "Apache-2.0",
                      "functions": ["utils.chat_template_utils.render_jinja_template"],
                      "engine": f"jinja2 {jinja2.__version__} (BSD-3-Clause)"},
           "messages": MESSAGES, "variables": VARIABLES, "cases": cases}
    with open("tests/golden/jinja_snippets.json", "w") as file:
        json.dump(out, file, indent=0)


main()
