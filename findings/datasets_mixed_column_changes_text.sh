#!/usr/bin/env bash
# datasets 5.2.0, load_dataset("json") on a valid JSONL file in which one column holds text in some rows and an object
# in another, as answers and tool calls do.
#
# The column becomes the feature Json, and text in it that happens to be JSON is read a second time: quotes vanish,
# "007" is the number 7. In a column of text alone the same values stay as they are in the file, but an ISO date
# becomes a datetime.
#
# Output seen:
#   mixed column: Json(decode=True): ['said', 7, True, {'name': 'find'}]
#   text column:  ['"said"', '007', 'true', 'plain']
#   date column:  [datetime.datetime(2026, 11, 28, 0, 0)]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m pip install -q --target packages datasets==5.2.0
PYTHONPATH=packages HF_HUB_OFFLINE=1 HF_HOME="$folder/home" python3 - 2> /dev/null <<'PYTHON'
import datetime
import json

from datasets import load_dataset


def read(name, values):
    with open(f"{name}.jsonl", "w") as file:
        file.writelines(json.dumps({"answer": value}) + "\n" for value in values)
    return load_dataset("json", data_files=f"{name}.jsonl", split="train")


mixed = read("mixed", ['"said"', "007", "true", {"name": "find"}])
print("mixed column:", f"{mixed.features['answer']}:", mixed["answer"][:])
text = read("text", ['"said"', "007", "true", "plain"])
print("text column: ", text["answer"][:])
dates = read("dates", ["2026-11-28"])
print("date column: ", dates["answer"][:])
assert mixed["answer"][:] != ['"said"', "007", "true", {"name": "find"}]
assert text["answer"][:] == ['"said"', "007", "true", "plain"]
assert isinstance(dates["answer"][0], datetime.datetime)
PYTHON
