"""The commands of a chat, as /help lists them."""

from __future__ import annotations

NO_ADAPTER = "none"  # as /adapter calls the base
COMMANDS = {  # name -> (usage, what it does); Chat.do_NAME does it
    "adapter": (
        "/adapter NAME",
        f"let another adapter answer; {NO_ADAPTER}: the base alone; a directory: load it",
    ),
    "base": ("/base", "the base alone answers the last question, for comparison; the conversation stays as it is"),
    "retry": ("/retry", "ask the last question again"),
    "undo": ("/undo", "take back the last question and its answer"),
    "reset": ("/reset", "begin a new conversation"),
    "system": ("/system TEXT", "begin a new conversation under this system message, or under none"),
    "save": ("/save FILE", "append the conversation to a .jsonl file, as training data"),
    "settings": ("/settings NAME=VALUE ...", "show the settings, or change some of temperature, top_p, ..."),
    "help": ("/help", "this list"),
    "quit": ("/quit", "end the chat; Ctrl-D too"),
}
