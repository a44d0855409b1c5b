"""What a chat template writes before what somebody says, found with a conversation of one question."""

from functools import lru_cache

from megatron_idft.corpus.records import Message
from megatron_idft.data.chat.template import ChatTemplate
from megatron_idft.errors import ConversationError

QUESTION: list[Message] = [{"role": "user", "content": "Xquestion"}]


@lru_cache(maxsize=8)
def generation_prompt(template: ChatTemplate) -> str:
    """What `add_generation_prompt` appends to a conversation."""
    try:
        without = template.render(QUESTION)
        return template.render(QUESTION, add_generation_prompt=True).removeprefix(without)
    except ConversationError:  # a template that wants a system message, say
        return ""


@lru_cache(maxsize=8)
def first_header(template: ChatTemplate) -> str:
    """What a conversation begins with, up to the words of its first question."""
    try:
        return template.render(QUESTION).partition("Xquestion")[0]
    except ConversationError:
        return ""
