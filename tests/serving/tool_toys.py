"""Chat templates of toys, one for each form of calls."""

from keifu.data.tokenizers.chat_template import CHATML
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.data.tokenizers.train import train_tokenizer

HEAD = "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}{% for m in messages %}"
TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}"
TAIL = "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TAGGED = (  # as Hermes and Qwen
    "{% for c in m.tool_calls or [] %}{{ '\n' if m.content or not loop.first }}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
)
LISTED = (  # a list after a special token, each call with its id, as Mistral
    "{% for c in m.tool_calls or [] %}{{ '[CALLS] [' if loop.first else ', ' }}"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}, "id": "{{ c.id }}"}'
    "{{ ']' if loop.last }}{% endfor %}"
)
BARE = (  # one call at a time and no mark, as Llama 3.2
    "{% if m.tool_calls and m.tool_calls | length > 1 %}{{ raise_exception('one call at a time') }}{% endif %}"
    "{% for c in m.tool_calls or [] %}"
    '{"name": "{{ c.function.name }}", "parameters": {{ c.function.arguments | tojson }}}{% endfor %}'
)
OUTSIDE = (  # the name outside of JSON, special tokens around it
    "{% for c in m.tool_calls or [] %}[CALLS]{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }}{% endfor %}"
)
XML = (  # as Qwen3-Coder
    "{% for c in m.tool_calls or [] %}{{ '\n' if m.content or not loop.first }}<tool_call>\n"
    "<function={{ c.function.name }}>\n{% for k, v in c.function.arguments.items() %}<parameter={{ k }}>\n"
    "{{ v if v is string else v | tojson }}\n</parameter>\n{% endfor %}</function>\n</tool_call>{% endfor %}"
)
KEYED = (  # as GLM, whose turns of calls begin with empty thoughts
    "{% for c in m.tool_calls or [] %}{{ '\n<think></think>' if loop.first }}\n<tool_call>{{ c.function.name }}\n"
    "{% for k, v in c.function.arguments.items() %}<arg_key>{{ k }}</arg_key>\n"
    "<arg_value>{{ v if v is string else v | tojson }}</arg_value>\n{% endfor %}</tool_call>{% endfor %}"
)
TEXTUAL = (  # special tokens, and the arguments put in as text, as DeepSeek
    "{% for c in m.tool_calls or [] %}{{ '[CALLS]' if loop.first }}[ARGS]{{ c.function.name }}<sep>"
    "{{ '' + c.function.arguments }}<end>{{ '<ends>' if loop.last }}{% endfor %}"
)
FORMS = {"tagged": TAGGED, "listed": LISTED, "bare": BARE, "outside": OUTSIDE}
BRACED = (  # keys without quotes, strings between marks, as Gemma
    "{% for c in m.tool_calls or [] %}[CALLS]call:{{ c.function.name }}{{ '{' }}"
    "{% for k, v in c.function.arguments | dictsort %}{{ ',' if not loop.first }}{{ k }}:"
    "{{ '<q>' + v + '<q>' if v is string else v | tojson }}{% endfor %}{{ '}' }}[ARGS]{% endfor %}"
)
FORMS |= {"braced": BRACED, "xml": XML, "keyed": KEYED, "textual": TEXTUAL}


def tokenizer_of(form: str | None) -> Tokenizer:
    """Return bytes, the tokens of turns and of calls, and a template of this form; None: one that knows no tools."""
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>", "[CALLS]", "[ARGS]"]
    trained = train_tokenizer("bpe", ["ab"], 262, special_tokens=control[1:])
    found = Tokenizer(trained.backend, {"bos_token": control[0], "eos_token": control[0]})
    template = CHATML if form is None else HEAD + TURN + FORMS[form] + TAIL
    return found.with_chat_template(template).replace(stop_ids=[found.token_id("<|im_end|>")])
