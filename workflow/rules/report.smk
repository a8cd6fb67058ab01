# From records to what people read. Every step reads tidy tables alone.

TABLES = REPORTS / "tables"
CLAIMED = traces(PLAN.claims) if PLAN.study.trace_claims else {}


rule aggregate:
    input:
        [RESULTS / "train" / model / task / budget / f"{'+'.join(methods)}.json" for model, task, budget, methods in PLAN.jobs()],
        [RESULTS / "cost" / model / f"{task}.json" for model, task in PAIRS],
    output:
        RESULTS / "runs.parquet",
        RESULTS / "curves.parquet",
        RESULTS / "costs.parquet",
    params:
        plan=RESOLVED,
        texts=TEXTS,
    log:
        LOGS / "aggregate.log",
    localrule: True
    message:
        "collecting records"
    shell:
        "costbp aggregate --plan {params.plan:q} > {log:q} 2>&1"


rule tables:
    input:
        rules.aggregate.output,
    output:
        report(
            multiext(str(TABLES / "summary"), ".md", ".csv", ".tex"),
            caption="../report/summary.rst",
            category="Tables",
        ),
        report(
            multiext(str(TABLES / "cost"), ".md", ".csv"),
            caption="../report/cost.rst",
            category="Tables",
        ),
    params:
        plan=RESOLVED,
        texts=TEXTS,
    log:
        LOGS / "tables.log",
    localrule: True
    message:
        "writing tables"
    shell:
        "costbp tables --plan {params.plan:q} > {log:q} 2>&1"


rule figures:
    input:
        rules.aggregate.output,
    output:
        report(
            expand(REPORTS / "figures" / "{name}.png", name=[figure.name for figure in REPORT]),
            caption="../report/figure.rst",
            category="Figures",
        ),
        expand(
            REPORTS / "figures" / "{name}.{kind}",
            name=[figure.name for figure in REPORT],
            kind=["pdf", "svg"],
        ),
    params:
        plan=RESOLVED,
        texts=TEXTS,
    log:
        LOGS / "figures.log",
    localrule: True
    message:
        "drawing figures"
    shell:
        "costbp figures --plan {params.plan:q} > {log:q} 2>&1"


rule trace_claim:
    output:
        RESULTS / "claims" / "{trace}.json",
    params:
        plan=RESOLVED,
        words=lambda wildcards: CLAIMED[f"{wildcards.trace}.json"].words,
        specs=lambda wildcards: PLAN.trace_key(
            CLAIMED[f"{wildcards.trace}.json"].model, CLAIMED[f"{wildcards.trace}.json"].methods
        ),
    log:
        LOGS / "trace_claim" / "{trace}.log",
    threads: 1
    resources:
        mem_mb=lambda wildcards, attempt: KNOWN.mem_mb(attempt),
    message:
        "tracing for claims: {params.words}"
    shell:
        "OMP_NUM_THREADS={threads} costbp cost --plan {params.plan:q} {params.words} --out {output:q}"
        " > {log:q} 2>&1"


rule claims:
    input:
        rules.aggregate.output,
        [RESULTS / "claims" / name for name in CLAIMED],
    output:
        report(
            multiext(str(REPORTS / "claims"), ".md", ".json"),
            caption="../report/claims.rst",
            category="Claims",
        ),
    params:
        plan=RESOLVED,
        texts=TEXTS,
        claims=PLAN.claims_key(),
    log:
        LOGS / "claims.log",
    localrule: True
    message:
        "judging claims"
    shell:
        "costbp claims --plan {params.plan:q} > {log:q} 2>&1"


rule report:
    input:
        rules.tables.output,
        rules.figures.output,
        rules.claims.output,
    output:
        report(REPORTS / "index.html", caption="../report/report.rst", category="Report"),
    params:
        plan=RESOLVED,
        texts=TEXTS,
    log:
        LOGS / "report.log",
    localrule: True
    message:
        "writing {output}"
    shell:
        "costbp report --plan {params.plan:q} > {log:q} 2>&1"


rule track:
    input:
        rules.report.output,
    output:
        RESULTS / "track.json",
    params:
        plan=RESOLVED,
    log:
        LOGS / "track.log",
    localrule: True
    message:
        "completing the MLflow store"
    shell:
        "costbp track --plan {params.plan:q} --out {output:q} > {log:q} 2>&1"
