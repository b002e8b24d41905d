"""The configuration for people and editors, from its one schema.

sparsity-atlas schema json --output workflow/config/schema.json
sparsity-atlas schema markdown --output docs/configuration.md
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from sparsity_atlas.config.schema import Config
from sparsity_atlas.files.whole import write_text

_SECTIONS = {
    "models.<name>": "ModelEntry",
    "models.<name>.revisions.<revision>": "RevisionEntry",
    "models.<name>.diffusion": "DiffusionSettings",
    "criteria.<name>": "CriterionEntry",
    "texts.<name>": "TextEntry",
    "tasks.<name>": "TaskEntry",
    "tasks.<name>.inserted": "InsertedText",
    "run, each block": "RunBlock",
    "run, each block, speed": "SpeedSettings",
    "capture": "CaptureSettings",
    "calibration": "CalibrationSettings",
    "search": "SearchSettings",
    "studies": "StudySettings",
    "studies.truthfulness": "TruthfulnessSettings",
}


def schema() -> dict[str, Any]:
    """JSON schema of a configuration file.

    Nothing is required at the top: a second `--configfile` gives only what it changes. An entry of a
    catalogue may be left empty.
    """
    content = Config.model_json_schema()
    del content["required"]
    # For YAML anchors; `config.parse` leaves them out.
    content["patternProperties"] = {"^x-": {}}
    for catalogue in ("models", "criteria", "texts", "tasks"):
        values = content["properties"][catalogue]
        values["additionalProperties"] = {
            "anyOf": [values["additionalProperties"], {"type": "null"}]
        }
    return content


def json_text() -> str:
    """The schema as it stands in workflow/config/schema.json."""
    return json.dumps(schema(), indent=1, ensure_ascii=False) + "\n"


def markdown_text() -> str:
    """The reference as it stands in docs/configuration.md."""
    content = schema()
    lines = [
        "# The configuration",
        "",
        "Generated from the schema by `sparsity-atlas schema markdown`.",
        "`config.yaml` is the default; a second `--configfile` adds to the catalogues (`models`, `criteria`,",
        "`texts`, `tasks`) and replaces the selection (`run`). Relative paths are looked for in the working",
        "directory, then beside the Snakefile; `~` is your home.",
        "",
        "Keys at the top that begin with `x-` are yours, to hold YAML anchors:",
        "",
        "```yaml",
        "x-instruct: &instruct {apply_chat_template: true, max_length: 4096}",
        "models:",
        "  small: {<<: *instruct, hub: some/model-small}",
        "  large: {<<: *instruct, hub: some/model-large}",
        "```",
        "",
        "## Top level",
        "",
        *_table(content["properties"]),
    ]
    for title, definition in _SECTIONS.items():
        part = content["$defs"][definition]
        lines += ["", f"## `{title}`", "", part["description"].replace("\n", " ").strip(), ""]
        lines += _table(part["properties"])
    return "\n".join(lines) + "\n"


def _table(properties: dict[str, Any]) -> list[str]:
    rows = ["| key | value | default | |", "|---|---|---|---|"]
    for key, value in properties.items():
        default = value.get("default")
        shown = "" if default is None or isinstance(default, dict) else f"`{json.dumps(default)}`"
        about = value.get("description", "").replace("\n", " ").replace("|", "\\|")
        rows.append(f"| `{key}` | {_type(value)} | {shown} | {about} |")
    return rows


def _type(value: dict[str, Any]) -> str:
    if "$ref" in value:
        return "see below"
    if "enum" in value:
        return ", ".join(f"`{one}`" for one in value["enum"])
    if "const" in value:
        return f"`{value['const']}`"
    for key in ("anyOf", "oneOf"):
        if key in value:
            return " or ".join(_type(one) for one in value[key] if one.get("type") != "null")
    if value.get("type") == "array":
        return f"list of {_type(value['items'])}"
    kinds = value.get("type", "any")
    names = {"object": "mapping", "string": "text"}
    return " or ".join(
        names.get(kind, kind) for kind in ([kinds] if isinstance(kinds, str) else kinds)
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="sparsity-atlas schema", description=__doc__)
    parser.add_argument("form", choices=("json", "markdown"))
    parser.add_argument("--output", required=True, type=Path, help="file to write")
    arguments = parser.parse_args()
    write_text(arguments.output, json_text() if arguments.form == "json" else markdown_text())
