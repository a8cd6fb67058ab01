# What theory says of estimates, held against measured ones. Not part of `all`:
# `snakemake insight --cores all`.

INSIGHT = PLAN.study.insight
PROBLEMS = INSIGHT.problems if INSIGHT else {}


rule measure:
    input:
        lambda wildcards: [
            RESULTS / "prepared" / problem.model / f"{problem.task}.json"
            for problem in [PROBLEMS[wildcards.problem]]
            if problem.kind == "model"
        ],
    output:
        RESULTS / "insight" / "{problem}.json",
    params:
        plan=RESOLVED,
        specs=lambda wildcards: INSIGHT.key(wildcards.problem, PLAN.catalog),
    log:
        LOGS / "measure" / "{problem}.log",
    benchmark:
        LOGS / "measure" / "{problem}.benchmark.jsonl"
    threads: 1
    resources:
        mem_mb=lambda wildcards, attempt: KNOWN.mem_mb(attempt),
        runtime=lambda wildcards, attempt: KNOWN.runtime(attempt),
    message:
        "measuring {wildcards.problem}"
    shell:
        "OMP_NUM_THREADS={threads} costbp measure {wildcards.problem:q} --plan {params.plan:q}"
        " --out {output:q} > {log:q} 2>&1"


rule insight:
    input:
        again,
        expand(RESULTS / "insight" / "{problem}.json", problem=list(PROBLEMS)),
    output:
        report(
            REPORTS / "insight" / "index.html", caption="../report/insight.rst", category="Insight"
        ),
        REPORTS / "insight" / "points.csv",
    params:
        plan=RESOLVED,
        texts=TEXTS,
    log:
        LOGS / "insight.log",
    localrule: True
    message:
        "writing {output[0]}"
    shell:
        "costbp insight --plan {params.plan:q} > {log:q} 2>&1"
