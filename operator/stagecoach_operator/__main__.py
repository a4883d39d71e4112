"""The operator: `python -m stagecoach_operator [--settings FILE]`."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
from collections.abc import Sequence

from stagecoach_operator.settings import DEFAULT_FILE, ENV_FILE, Settings, SettingsError, load_settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until a signal arrives or the Lease is lost; return the exit code."""
    parser = argparse.ArgumentParser(prog="stagecoach-operator", description="Runs TrainingRuns in a cluster.")
    parser.add_argument("--settings", metavar="FILE", help=f"settings file (default: {ENV_FILE}, else {DEFAULT_FILE})")
    options = parser.parse_args(arguments)
    environment = dict(os.environ)
    if options.settings is not None:
        environment[ENV_FILE] = options.settings
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname).1s %(name)s: %(message)s")
    logging.getLogger("kopf.objects").setLevel(logging.WARNING)  # it logs every event of every object
    try:
        settings = load_settings(environment)
        code = settings.code
    except SettingsError as error:
        print(f"stagecoach-operator: {error}", file=sys.stderr)
        return 64
    logging.getLogger(__name__).info("trainer %s, code %s", settings.trainer_image, code[:12])
    return asyncio.run(_run(settings))


async def _run(settings: Settings) -> int:
    from stagecoach_operator.application import Application

    return await Application(settings).run()


if __name__ == "__main__":
    sys.exit(main())
