"""`python -m stagecoach_trainer.look`: JSON of a run's stages on standard input, JSON of what was found on the output.

Input: `{"stages": [{"kind": …, "config": …}], "local": {URI as written: absolute URI}}`. Output: a list of
`{"stage": index, "path": […], "value": …, "rule": …, "remedy": …, "fatal": …}`. The command line, which imports no
trainer, calls this before a run starts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from stagecoach_api.kinds import STAGE_KINDS
from stagecoach_trainer.look.finding import Finding
from stagecoach_trainer.look.models import look_at_models
from stagecoach_trainer.look.records import look_at_records


def findings(stage: dict[str, Any], local: dict[str, str]) -> Iterator[Finding]:
    """Yield what is found about the local inputs of one stage."""
    kind = STAGE_KINDS[stage["kind"]]
    config = kind.config.model_validate_json(json.dumps(stage["config"]))
    yield from look_at_models(kind, config, local)
    yield from look_at_records(kind.name, config, local)


def main() -> None:
    asked = json.load(sys.stdin)
    found = [
        {"stage": index, **asdict(finding)}
        for index, stage in enumerate(asked["stages"])
        for finding in findings(stage, asked["local"])
    ]
    json.dump(found, sys.stdout, ensure_ascii=False, default=str)


if __name__ == "__main__":
    main()
