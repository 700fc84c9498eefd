"""The commands of a chat, as /help lists them."""

from __future__ import annotations

NO_ADAPTER = "none"  # as /adapter calls the base
COMMANDS = {  # name -> (usage, what it does); Chat.do_NAME does it
    "adapter": (
        "/adapter NAME",
        f"switch to this adapter; {NO_ADAPTER}: the base alone; a directory: load it first",
    ),
    "base": ("/base", "show the base's answer to the last question; the conversation does not change"),
    "retry": ("/retry", "ask the last question again"),
    "undo": ("/undo", "remove the last question and its answer"),
    "reset": ("/reset", "start a new conversation"),
    "system": ("/system TEXT", "start a new conversation with this system message, or with none"),
    "save": ("/save FILE", "append the conversation to a .jsonl file, as training data"),
    "settings": ("/settings NAME=VALUE ...", "show the settings, or change temperature, top_p, ..."),
    "help": ("/help", "this list"),
    "quit": ("/quit", "end the chat (also Ctrl-D)"),
}
