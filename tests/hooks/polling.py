"""Has Snakemake look at a cluster's jobs every STATUS_SECONDS, if the environment has it.

Executors wait longer each time that no job has ended, Slurm's by ten seconds: most of a test that is done
in seconds would be waiting for the next look.
"""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

if "STATUS_SECONDS" in os.environ and "snakemake" in sys.orig_argv:
    from snakemake_interface_executor_plugins.executors.remote import RemoteExecutor

    async def _sleep(_: Any) -> None:
        await asyncio.sleep(float(os.environ["STATUS_SECONDS"]))

    RemoteExecutor.sleep = _sleep
