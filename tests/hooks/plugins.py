"""Has Snakemake look for schedulers and reporters, once for all forks: no test brings one of its own."""

from __future__ import annotations

from snakemake_interface_report_plugins.registry import ReportPluginRegistry
from snakemake_interface_scheduler_plugins.registry import SchedulerPluginRegistry

ReportPluginRegistry()
SchedulerPluginRegistry()
