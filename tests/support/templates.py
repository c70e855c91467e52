"""Chat templates in the manner of well-known families, short: how they write tools, calls, results and reasoning."""

from __future__ import annotations

HERMES = """{%- if tools %}{{- '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
{{- '# Tools\\n<tools>' }}{%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
{{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'user' %}{{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}
{%- elif message.role == 'assistant' %}{{- '<|im_start|>assistant' }}
    {%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
    {%- for call in message.tool_calls %}
        {{- '\\n<tool_call>\\n{"name": "' }}{{- call.function.name }}{{- '", "arguments": ' }}
        {{- call.function.arguments | tojson }}{{- '}\\n</tool_call>' }}
    {%- endfor %}{{- '<|im_end|>\\n' }}
{%- elif message.role == 'tool' %}
    {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
"""Qwen 2.5, Hermes and others: text marks around each call."""

THINKING = HERMES.replace(
    "{%- if message.content %}{{- '\\n' + message.content }}{%- endif %}",
    """{{- '\\n' }}
    {%- if loop.last or message.reasoning_content %}
        {{- '<think>\\n' + (message.reasoning_content or '') + '\\n</think>\\n\\n' }}
    {%- endif %}{{- message.content or '' }}""",
).replace(
    "{%- for call in message.tool_calls %}\n        {{- '\\n<tool_call>",
    "{%- for call in message.tool_calls %}\n        {%- if not loop.first %}{{- '\\n' }}{%- endif %}{{- '<tool_call>",
)
"""Qwen 3: the same, and reasoning before the answer, if the model wants."""

OPENED = THINKING.replace("{{- '<|im_start|>assistant\\n' }}", "{{- '<|im_start|>assistant\\n<think>\\n' }}")
"""Qwen 3 Thinking: the prompt begins the reasoning."""

MISTRAL = """{{- bos_token }}
{%- for message in messages %}
{%- if message.role == 'user' %}
    {%- if tools and loop.first %}{{- '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{%- endif %}
    {{- '[INST] ' + message.content + '[/INST]' }}
{%- elif message.role == 'assistant' and message.tool_calls %}
    {{- '[TOOL_CALLS] [' }}
    {%- for call in message.tool_calls %}
        {%- if call.id | length != 9 %}{{- raise_exception('Tool call IDs have length 9') }}{%- endif %}
        {{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' }}
        {%- if not loop.last %}{{- ', ' }}{%- endif %}
    {%- endfor %}
    {{- ']' + eos_token }}
{%- elif message.role == 'assistant' %}{{- ' ' + message.content + eos_token }}
{%- elif message.role == 'tool' %}
    {{- '[TOOL_RESULTS] {"content": ' + message.content + ', "call_id": "' + message.tool_call_id + '"}' }}
    {{- '[/TOOL_RESULTS]' }}
{%- else %}{{- raise_exception('Only user, assistant and tool roles') }}
{%- endif %}
{%- endfor %}
"""
"""Mistral 7B v0.3: a special token before a list, an id in each call."""

LLAMA = """{{- bos_token }}
{%- for message in messages %}
{%- if message.role == 'tool' %}
    {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + (message.content | tojson) + '<|eot_id|>' }}
{%- elif message.tool_calls %}
    {%- if message.tool_calls | length != 1 %}{{- raise_exception('Only single tool-calls at once!') }}{%- endif %}
    {%- set call = message.tool_calls[0].function %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
    {{- '{"name": "' + call.name + '", ' + '"parameters": ' }}{{- call.arguments | tojson }}{{- '}' + '<|eot_id|>' }}
{%- else %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
    {%- if tools and loop.first %}{{- 'Functions: ' + (tools | tojson) + '\\n\\n' }}{%- endif %}
    {{- message.content | trim + '<|eot_id|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""
"""Llama 3.1: an answer that is JSON from its first letter on is a call, one at a time."""

DEEPSEEK = """{{- bos_token }}{%- if tools %}{{- (tools | tojson) }}{%- endif %}
{%- for message in messages %}
{%- if message.role == 'user' %}{{- '<｜User｜>' + message.content }}
{%- elif message.role == 'assistant' and message.content is none %}
    {{- '<｜Assistant｜><｜tool▁calls▁begin｜>' }}
    {%- for call in message.tool_calls %}
        {%- if not loop.first %}{{- '\\n' }}{%- endif %}
        {{- '<｜tool▁call▁begin｜>' + call.type + '<｜tool▁sep｜>' + call.function.name + '\\n```json\\n' }}
        {{- call.function.arguments + '\\n```<｜tool▁call▁end｜>' }}
    {%- endfor %}{{- '<｜tool▁calls▁end｜><｜end▁of▁sentence｜>' }}
{%- elif message.role == 'assistant' %}{{- '<｜Assistant｜>' + message.content + '<｜end▁of▁sentence｜>' }}
{%- elif message.role == 'tool' %}{{- '<｜tool▁output▁begin｜>' + message.content + '<｜tool▁output▁end｜>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<｜Assistant｜>' }}{%- endif %}
"""
"""DeepSeek V3: arguments as text in a fence, calls only in messages without content."""

XML = """{%- if tools %}{{- tools | tojson }}{%- endif %}
{%- for message in messages %}{{- '<' + message.role + '>' + (message.content or '') }}
{%- for call in message.tool_calls %}{{- '<function=' + call.function.name + '>' }}
{%- for name, value in call.function.arguments.items() %}{{- '<parameter=' + name + '>' + value + '</parameter>' }}
{%- endfor %}{{- '</function>' }}{%- endfor %}{{- '<|im_end|>' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<assistant>' }}{%- endif %}
"""
"""Qwen 3 Coder: arguments that are no JSON."""
