"""Records in the forms that people have: what each says, and what is refused and how."""

import json


def system(text="be brief"):
    return {"role": "system", "content": text}


def user(text="q", **keys):
    return {"role": "user", "content": text, **keys}


def assistant(text="r", **keys):
    return {"role": "assistant", "content": text, **keys}


def tool(text="7", **keys):
    return {"role": "tool", "content": text, **keys}


def turn(speaker, value, **keys):
    return {"from": speaker, "value": value, **keys}


def called(name, arguments, **keys):
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **keys}


def text_part(text, kind="text", **keys):
    return {"type": kind, "text": text, **keys}


QA = [user(), assistant()]
EARLIER = [user("a"), assistant("b")]
HUMAN, GPT = turn("human", "q"), turn("gpt", "r")
ASKED, SAID = user([text_part("q")]), assistant([text_part("r")])
TALK = {"conversations": [HUMAN, GPT]}
ALPACA = {"instruction": "q", "input": "", "output": "r"}
LISTS = {"prompt": [user()], "completion": [assistant()]}
BARE_TOOL = {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}
TOOL = {"type": "function", "function": BARE_TOOL}
ADD = {"name": "add", "arguments": {"a": 3}}

# (record, messages, form)
READ = {
    # messages
    "messages": ({"messages": QA}, QA, "messages"),
    "messages as JSON text": ({"messages": json.dumps(QA)}, QA, "messages"),
    "messages as JSON text, with nulls": (
        {"messages": json.dumps([user(name=None), assistant(tool_calls=None)])},
        QA,
        "messages",
    ),
    "messages as JSON text, with a null in arguments": (
        {"messages": json.dumps([user(), assistant("", tool_calls=[called("add", {"a": None})])])},
        [user(), assistant("", tool_calls=[called("add", {"a": None})])],
        "messages",
    ),
    "messages of turns": ({"messages": [HUMAN, GPT]}, QA, "messages"),
    "messages beside a prompt": ({"messages": QA, "prompt": "title"}, QA, "messages"),
    "messages beside what they were made of": ({"messages": QA} | ALPACA, QA, "messages"),
    "messages beside a pair of answers": ({"messages": QA, "chosen": "r", "rejected": "s"}, QA, "messages"),
    "messages beside the same conversations": ({"messages": QA} | TALK, QA, "messages"),
    "messages with ids of their own beside other conversations": (
        {"messages": QA, "token_ids": [1, 2], "loss_mask": [0, 1], "conversations": [HUMAN, turn("gpt", "s")]},
        QA,
        "messages",
    ),
    "messages beside null conversations": ({"messages": QA, "conversations": None}, QA, "messages"),
    # content as parts
    "a text part": ({"messages": [user([text_part("q")]), assistant([text_part("r")])]}, QA, "messages"),
    "parts are joined": (
        {"messages": [user([text_part("q"), text_part("\nq2")]), assistant([text_part("r")])]},
        [user("q\nq2"), assistant()],
        "messages",
    ),
    "parts of the Responses API": (
        {
            "messages": [
                user([text_part("q", "input_text")]),
                assistant([text_part("r", "output_text", annotations=[])]),
            ]
        },
        QA,
        "messages",
    ),
    "a part without a type": ({"messages": [user([{"text": "q"}]), assistant([{"text": "r"}])]}, QA, "messages"),
    "a part with null for an image": (
        {"messages": [user([text_part("q", image_url=None)]), assistant([text_part("r")])]},
        QA,
        "messages",
    ),
    "a part that is cached": (
        {"messages": [user([text_part("q", cache_control={"type": "ephemeral"})]), assistant([text_part("r")])]},
        QA,
        "messages",
    ),
    "no parts beside a call": (
        {"messages": [user([text_part("q")]), assistant([], tool_calls=[called("add", {"a": 3})])]},
        [user(), assistant("", tool_calls=[called("add", {"a": 3})])],
        "messages",
    ),
    "parts of a turn": (
        {"conversations": [turn("human", [text_part("q")]), turn("gpt", [text_part("r")])]},
        QA,
        "ShareGPT",
    ),
    # prompt and response
    "prompt and response": ({"prompt": "q", "response": "r"}, QA, "prompt-response"),
    "prompt of messages and response": (
        {"prompt": [system(), user()], "response": "r"},
        [system(), *QA],
        "prompt-response",
    ),
    "prompt and response beside Alpaca's keys": (
        {"prompt": "q", "response": "r", "instruction": "i", "output": "o"},
        QA,
        "prompt-response",
    ),
    "response beside the same completion": ({"prompt": "q", "response": "r", "completion": "r"}, QA, "prompt-response"),
    # prompt and completion
    "prompt and completion": (LISTS, QA, "prompt-completion"),
    "prompt and completion as text": ({"prompt": "q", "completion": "r"}, QA, "prompt-completion"),
    "prompt of messages and completion as text": ({"prompt": [user()], "completion": "r"}, QA, "prompt-completion"),
    "prompt as text and completion of messages": (
        {"prompt": "q", "completion": [assistant()]},
        QA,
        "prompt-completion",
    ),
    "a prompt with a system": (LISTS | {"prompt": [system(), user()]}, [system(), *QA], "prompt-completion"),
    "a system beside the prompt": (LISTS | {"system": "be brief"}, [system(), *QA], "prompt-completion"),
    "answers in the prompt": (
        LISTS | {"prompt": [*EARLIER, user()]},
        [user("a"), assistant("b", loss=0), *QA],
        "prompt-completion",
    ),
    "answers in the prompt that say they are trained": (
        LISTS | {"prompt": [user("a"), assistant("b", loss=1), user()]},
        [user("a"), assistant("b", loss=1), *QA],
        "prompt-completion",
    ),
    "a completion with a tool": (
        {"prompt": [user()], "completion": [assistant("", tool_calls=[{"function": ADD}]), tool(), assistant()]},
        [user(), assistant("", tool_calls=[called("add", {"a": 3})]), tool(), assistant()],
        "prompt-completion",
    ),
    "a completion of parts": (LISTS | {"completion": [assistant([text_part("r")])]}, QA, "prompt-completion"),
    "history before the prompt": (
        {"prompt": "q", "completion": "r", "history": [["a", "b"]]},
        [*EARLIER, *QA],
        "prompt-completion",
    ),
    # ShareGPT
    "human and gpt": (TALK, QA, "ShareGPT"),
    "user and assistant": ({"conversations": [turn("user", "q"), turn("assistant", "r")]}, QA, "ShareGPT"),
    "chatgpt": ({"conversations": [HUMAN, turn("chatgpt", "r")]}, QA, "ShareGPT"),
    "bing": ({"conversations": [HUMAN, turn("bing", "r")]}, QA, "ShareGPT"),
    "bard": ({"conversations": [HUMAN, turn("bard", "r")]}, QA, "ShareGPT"),
    "capitals as in NeMo": ({"conversations": [turn("User", "q"), turn("Assistant", "r")]}, QA, "ShareGPT"),
    "the mask of NeMo": (
        {"conversations": [turn("User", "q"), turn("Assistant", "r")], "mask": "User"},
        QA,
        "ShareGPT",
    ),
    "a system turn": ({"conversations": [turn("system", "be brief"), HUMAN, GPT]}, [system(), *QA], "ShareGPT"),
    "a system column": (TALK | {"system": "be brief"}, [system(), *QA], "ShareGPT"),
    "an empty system column": (TALK | {"system": ""}, QA, "ShareGPT"),
    "the same system twice": (
        {"conversations": [turn("system", "be brief"), HUMAN, GPT], "system": "be brief"},
        [system(), *QA],
        "ShareGPT",
    ),
    "conversations of messages": ({"conversations": QA}, QA, "ShareGPT"),
    "conversations as JSON text": ({"conversations": json.dumps([HUMAN, GPT])}, QA, "ShareGPT"),
    "a turn of weight 0": (
        {"conversations": [HUMAN, turn("gpt", "r", weight=0), HUMAN, turn("gpt", "r", weight=1)]},
        [user(), assistant(loss=0), user(), assistant(loss=1)],
        "ShareGPT",
    ),
    "a turn that is not trained": (
        {"conversations": [HUMAN, turn("gpt", "r", train=False), HUMAN, GPT]},
        [user(), assistant(loss=False), *QA],
        "ShareGPT",
    ),
    "a call and what was observed": (
        {"conversations": [HUMAN, turn("function_call", json.dumps(ADD)), turn("observation", "7"), GPT]},
        [user(), assistant("", tool_calls=[called("add", {"a": 3})]), tool(), assistant()],
        "ShareGPT",
    ),
    "two calls, arguments as text": (
        {
            "conversations": [
                HUMAN,
                turn("function_call", json.dumps([ADD, {"name": "b", "arguments": '{"c": 1}'}])),
                GPT,
            ]
        },
        [user(), assistant("", tool_calls=[called("add", {"a": 3}), called("b", {"c": 1})]), assistant()],
        "ShareGPT",
    ),
    "a call beside null for calls": (
        {"conversations": [HUMAN, turn("function_call", json.dumps(ADD), tool_calls=None)]},
        [user(), assistant("", tool_calls=[called("add", {"a": 3})])],
        "ShareGPT",
    ),
    "a tool's turn": (
        {"conversations": [HUMAN, turn("gpt", "", tool_calls=[{"function": ADD}]), turn("tool", "7"), GPT]},
        [user(), assistant("", tool_calls=[called("add", {"a": 3})]), tool(), assistant()],
        "ShareGPT",
    ),
    "conversations beside a part of Alpaca": (TALK | {"input": "q", "output": "r"}, QA, "ShareGPT"),
    "conversations beside a lone prompt": (TALK | {"prompt": "q"}, QA, "ShareGPT"),
    "conversations beside the same Alpaca": (TALK | ALPACA, QA, "ShareGPT"),
    # Alpaca
    "Alpaca": (ALPACA, QA, "Alpaca"),
    "Alpaca without an input": ({"instruction": "q", "output": "r"}, QA, "Alpaca"),
    "Alpaca with a null input": (ALPACA | {"input": None}, QA, "Alpaca"),
    "Alpaca with an input": (ALPACA | {"input": "about x"}, [user("q\n\nabout x"), assistant()], "Alpaca"),
    "Alpaca with an input alone": (ALPACA | {"instruction": "", "input": "q"}, QA, "Alpaca"),
    "Alpaca with a history": (ALPACA | {"history": [["a", "b"]]}, [*EARLIER, *QA], "Alpaca"),
    "Alpaca with an empty history": (ALPACA | {"history": []}, QA, "Alpaca"),
    "Alpaca with a system": (ALPACA | {"system": "be brief"}, [system(), *QA], "Alpaca"),
    "Alpaca with columns of other forms": (
        ALPACA | {"messages": None, "conversations": None, "prompt": None, "response": None, "chosen": None},
        QA,
        "Alpaca",
    ),
    "Alpaca with its rendering": (ALPACA | {"text": "### Instruction: q"}, QA, "Alpaca"),
}


def pair(**keys):
    return {"prompt": "q", "chosen": "r", "rejected": "s", **keys}


# (record, field, words)
REFUSED = {
    "nothing": ({"note": "n"}, "messages", "missing; this record has 'note'"),
    "plain text": ({"text": "Once upon a time"}, "text", 'who speaks, so no answer can be trained: write "messages"'),
    "a pair of answers": (pair(), "rejected", '"completion" beside "prompt", "output"'),
    "two conversations to choose from": ({"chosen": QA, "rejected": QA}, "rejected", "pairs of answers"),
    "a pair beside conversations": ({"conversations": [HUMAN], "chosen": GPT, "rejected": GPT}, "rejected", "pairs"),
    "a pair beside messages that ask": ({"messages": [user()], "chosen": GPT, "rejected": GPT}, "rejected", "pairs"),
    "a pair for an instruction": ({"instruction": "q", "chosen": "r", "rejected": "s"}, "rejected", "pairs"),
    "a pair beside Alpaca's keys": (ALPACA | {"chosen": "r", "rejected": "s"}, "rejected", "pairs"),
    "a judged completion": ({"prompt": "q", "completion": "r", "label": False}, "label", "leave out the records"),
    "a judged conversation": (TALK | {"kto_tag": True}, "kto_tag", "leave out the records"),
    "a prompt": ({"prompt": "q"}, "response", '"prompt" belongs to the prompt-response form'),
    "a prompt of messages": ({"prompt": [user()]}, "response", "expected a string, found nothing"),
    "an instruction": ({"instruction": "q", "input": "x"}, "output", '"instruction" belongs to the Alpaca form'),
    "question and answer": ({"question": "q", "answer": "r"}, "question", 'call them "prompt" and "response"'),
    "query and response": ({"query": "q", "response": "r"}, "query", 'call "query" "prompt"'),
    "instruction and response": ({"instruction": "q", "context": "", "response": "r"}, "instruction", '"output"'),
    "input and output": ({"input": "q", "output": "r"}, "input", 'call them "prompt" and "response"'),
    "a conversation": ({"conversation": QA}, "conversation", 'call it "conversations"'),
    # two forms at once
    "two conversations": (
        {"messages": QA, "conversations": [HUMAN, turn("gpt", "s")]},
        "conversations",
        '"conversations" and "messages" hold different conversations: keep one of them',
    ),
    "response and completion": ({"prompt": "q", "response": "r", "completion": "s"}, "completion", "different"),
    "conversations and Alpaca": (
        TALK | ALPACA | {"output": "s"},
        "instruction",
        '"instruction" and "output" and "conv',
    ),
    "completion and Alpaca": (LISTS | ALPACA | {"input": "x"}, "instruction", "hold different conversations"),
    "completion and conversations": (LISTS | TALK | {"prompt": [user("x")]}, "conversations", "different"),
    # messages as text
    "messages as Python writes them": ({"messages": str(QA)}, "messages", "not JSON"),
    "messages as text": ({"messages": "User: q"}, "messages", "write it as json.dumps does"),
    "messages as the JSON of an object": (
        {"messages": json.dumps(user())},
        "messages",
        "expected a list, found an obj",
    ),
    "messages as the JSON of nothing": ({"messages": "[]"}, "messages", "empty"),
    "messages as deep JSON": ({"messages": "[" * 100_000}, "messages", "more than 100 levels"),
    "a fault in JSON text": ({"messages": json.dumps([user(), assistant(3)])}, "messages[1].content", "found 3"),
    "half a letter in JSON text": ({"messages": '[{"role": "user", "content": "\\ud800"}]'}, "messages", "surrogate"),
    # content
    "an image": (
        {"messages": [user([text_part("q"), {"type": "image_url", "image_url": {"url": "x"}}]), SAID]},
        "messages[0].content[1].type",
        "'image_url' is not served, only text is",
    ),
    "an image of TRL": ({"messages": [user([{"type": "image"}]), SAID]}, "messages[0].content[0].type", "'image'"),
    "a call as a part": (
        {"messages": [ASKED, assistant([{"type": "tool_use", "name": "add", "input": {"a": 3}}])]},
        "messages[1].content[0].type",
        "'tool_use' is not served",
    ),
    "a thought as a part": (
        {"messages": [ASKED, assistant([{"type": "thinking", "thinking": "x"}, text_part("r")])]},
        "messages[1].content[0].type",
        "'thinking'",
    ),
    "text and an image in one part": (
        {"messages": [user([text_part("q", image="x.png")]), SAID]},
        "messages[0].content[0].image",
        "only text is",
    ),
    "a part without text": ({"messages": [user([{"type": "text"}])]}, "messages[0].content[0].text", "found nothing"),
    "a call of before": (
        {"messages": [user(), {"role": "assistant", "content": None, "function_call": ADD}]},
        "messages[1].function_call",
        "write it as tool_calls",
    ),
    "a part that is text": ({"messages": [user(["q"]), assistant()]}, "messages[0].content[0]", "found a string"),
    "empty parts": ({"messages": [ASKED, assistant([text_part(" ")])]}, "messages[1].content", "empty"),
    "no part": ({"messages": [ASKED, assistant([])]}, "messages[1].content", "empty"),
    "content as an object": (
        {"messages": [user({"text": "q"}), assistant()]},
        "messages[0].content",
        "found an object",
    ),
    # prompt and completion
    "a prompt that ends with the assistant": (
        LISTS | {"prompt": [user(), assistant("It")]},
        "prompt[1]",
        'write it at the beginning of "completion"',
    ),
    "a completion of the user": (LISTS | {"completion": QA}, "completion[0].role", "expected assistant"),
    "an empty prompt": (LISTS | {"prompt": []}, "prompt", "empty"),
    "an empty completion": (LISTS | {"completion": []}, "completion", "empty"),
    "an empty text as completion": (LISTS | {"completion": ""}, "completion", "empty: nothing to train on"),
    "history before messages": (LISTS | {"history": [["a", "b"]]}, "history", 'stands beside a "prompt" of messages'),
    "a fault in a prompt": (LISTS | {"prompt": [{"role": "x", "content": "q"}]}, "prompt[0].role", "none of system"),
    "a fault in a completion": (LISTS | {"completion": [assistant(3)]}, "completion[0].content", "found 3"),
    # ShareGPT
    "an unknown speaker": ({"conversations": [turn("Alice", "q"), GPT]}, "conversations[0].from", "'Alice' is none of"),
    "no speaker": ({"conversations": [{"value": "q"}, GPT]}, "conversations[0].role", '"from" and "value"'),
    "a speaker and content": (
        {"conversations": [{"from": "human", "content": "q"}]},
        "conversations[0].content",
        "from",
    ),
    "a role and a value": (
        {"conversations": [{"role": "user", "value": "q"}]},
        "conversations[0].value",
        "stands beside",
    ),
    "an empty answer": ({"conversations": [HUMAN, turn("gpt", "")]}, "conversations[1].value", "empty: nothing to"),
    "a null question": ({"conversations": [turn("human", None), GPT]}, "conversations[0].value", "found nothing"),
    "conversations of texts": ({"conversations": ["q", "r"]}, "conversations[0]", "expected an object, found a string"),
    "conversations as an object": ({"conversations": {"from": "human"}}, "conversations", "expected a list"),
    "no conversations": ({"conversations": []}, "conversations", "empty"),
    "a trained human": ({"conversations": [turn("human", "q", weight=1), GPT]}, "conversations[0].weight", "only what"),
    "a masked turn": ({"conversations": [HUMAN, turn("gpt", "r", mask=True)]}, "conversations[1].mask", "write loss"),
    "the mask of NeMo on answers": (TALK | {"mask": "Assistant"}, "mask", 'not served but for "User"'),
    "values of SteerLM": (
        {"conversations": [HUMAN, turn("gpt", "r", label="quality:4")], "mask": "User"},
        "conversations[1].label",
        "remove the key",
    ),
    "another system": (
        {"conversations": [turn("system", "x"), HUMAN, GPT], "system": "y"},
        "system",
        "contradicts the system message",
    ),
    "history beside conversations": (TALK | {"history": [["a", "b"]]}, "history", 'stands beside "conversations"'),
    "a call in words": (
        {"conversations": [HUMAN, turn("function_call", "add(3)")]},
        "conversations[1].value",
        "not JSON",
    ),
    "a call without a name": (
        {"conversations": [HUMAN, turn("function_call", '{"arguments": {}}')]},
        "conversations[1].value[0].function.name",
        "expected a name",
    ),
    "a call of another form": (
        {"conversations": [HUMAN, turn("function_call", '{"name": "add", "parameters": {"a": 3}}')]},
        "conversations[1].value",
        'expected {"name": …, "arguments": {…}} as JSON',
    ),
    "no call": (
        {"conversations": [HUMAN, turn("function_call", "[]")]},
        "conversations[1].value",
        "nothing to train on",
    ),
    "tools in words": (TALK | {"tools": "add(a, b)"}, "tools", "not JSON"),
    "images": (TALK | {"images": ["x.png"]}, "images", "only text is served"),
    # Alpaca
    "nothing asked": (ALPACA | {"instruction": " "}, "instruction", 'empty, and so is "input"'),
    "no answer": (ALPACA | {"output": ""}, "output", "empty: nothing to train on"),
    "an answer as a list": (ALPACA | {"output": ["r"]}, "output", "expected a string, found a list"),
    "an input as an object": (ALPACA | {"input": {"x": 1}}, "input", "expected a string, found an object"),
    "a weight": (ALPACA | {"weight": 0.5}, "weight", 'give the assistant\'s messages a "loss"'),
}
