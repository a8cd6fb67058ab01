"""Front door of the workflow: reads and validates the study, includes one file of rules a stage."""

import re
import shlex
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

from costbp.analysis.outputs import REPORT
from costbp.config import Cell, load_plan
from costbp.config.claims import traces
from costbp.errors import UserError
from costbp.files import ensure_folder, write_text
from costbp.data.pairs import check_pairs
from costbp.cost.outlook import Known, outlook_lines
from costbp.train.damage import bring_back, found_damaged


configfile: "config/config.yaml"


container: "docker://python:3.11-slim"


try:
    PLAN = check_pairs(load_plan(map(Path, workflow.overwrite_configfiles), merged=config))
    RESULTS = PLAN.results
    RESOLVED = RESULTS / "plan.json"
    resolved = PLAN.model_dump_json(indent=2) + "\n"
    if not RESOLVED.is_file() or RESOLVED.read_bytes() != resolved.encode():
        write_text(RESOLVED, resolved)
    DAMAGED = []
    if workflow.is_main_process:
        if PLAN.study.paths.reports.exists():
            ensure_folder(PLAN.study.paths.reports)  # Snakemake itself would end in a traceback
        for line in outlook_lines(PLAN, tunes="tune" in sys.argv):
            print(line, file=sys.stderr)
        bring_back(PLAN)
        DAMAGED = found_damaged(PLAN)
except (UserError, OSError) as error:
    raise WorkflowError(str(error)) from None

REPORTS = PLAN.study.paths.reports
LOGS = Path("logs") / PLAN.name
CELLS = list(PLAN.cells())
KNOWN = Known(PLAN)  # what jobs ask a scheduler for, more with each attempt
PAIRS = PLAN.pairs()
HEADS = [model for model, _ in PAIRS if PLAN.catalog.models[model].reads == "features"]
ENCODERS = [model for model, _ in PAIRS if model not in HEADS]
TEXTS = PLAN.texts_key()  # words of the report: a change redraws it, and runs nothing else

# Rules call the `costbp` that belongs to this interpreter, whatever PATH says, on every node.
# Waiting threads that spin would make small models 10-20x slower on a busy machine.
PROGRAMS = shlex.quote(str(Path(sys.executable).parent)).replace("{", "{{").replace("}", "}}")
shell.prefix(f"export PATH={PROGRAMS}:$PATH OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0; ")


# As an input no file: what is damaged is to be made again though it is there. In a dry run, too.
again = lambda wildcards: workflow.dag.forcefiles.update(DAMAGED) or []


wildcard_constraints:
    asset=r"[^/]+",
    model=r"[^/]+",
    task=r"[^/]+",
    method=r"[^/]+",
    methods=r"[^/]+",
    budget=r"[^/]+",
    problem=r"[^/]+",
    sweep=r"[^/]+",
    trace=r"[^/]+",


include: "workflow/rules/assets.smk"
include: "workflow/rules/train.smk"
include: "workflow/rules/tune.smk"
include: "workflow/rules/cost.smk"
include: "workflow/rules/costs.smk"
include: "workflow/rules/report.smk"
include: "workflow/rules/insight.smk"


localrules:
    all,


rule all:
    default_target: True
    input:
        again,
        REPORTS / "index.html",
        REPORTS / "tables" / "summary.md",
        REPORTS / "claims.md",
        RESULTS / "track.json",


onsuccess:
    print(f"study '{PLAN.name}': open {REPORTS / 'index.html'}; browse runs with `costbp ui`")


onerror:
    print(f"study '{PLAN.name}': a job failed; logs are in {LOGS}; finished runs are kept")
    # Whatever failed (training, a pair's data, a job killed for memory): what is there is reported.
    unwritten = {job.name for job in workflow.dag.needrun_jobs()} & {"aggregate"}
    if unwritten and workflow.scheduler.failed:
        retry = shlex.join(["snakemake", *sys.argv[1:]])
        shell("costbp report --partial --plan {RESOLVED:q} --retry {retry:q} || true")
