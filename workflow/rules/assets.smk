# Models and data: fetched once and checked; then each pair's splits, encoded once.


rule assets:
    output:
        RESULTS / "assets" / "{asset}.json",
    params:
        plan=RESOLVED,
        source=lambda wildcards: PLAN.assets(insight=True)[wildcards.asset].model_dump_json(),
    log:
        LOGS / "assets" / "{asset}.log",
    benchmark:
        LOGS / "assets" / "{asset}.benchmark.jsonl"
    localrule: True
    message:
        "fetching {wildcards.asset}"
    shell:
        "costbp assets --plan {params.plan:q} --only {wildcards.asset:q} --out {output:q} 2>&1 | tee {log:q}"


rule prepare:
    input:
        lambda wildcards: [
            RESULTS / "assets" / f"{name}.json"
            for name in PLAN.to_fetch(wildcards.model, wildcards.task)
        ],
    output:
        RESULTS / "prepared" / "{model}" / "{task}.json",
    params:
        plan=RESOLVED,
        key=lambda wildcards: PLAN.prepared(wildcards.model, wildcards.task).name,
    log:
        LOGS / "prepare" / "{model}" / "{task}.log",
    benchmark:
        LOGS / "prepare" / "{model}" / "{task}.benchmark.jsonl"
    threads: 1
    priority: 2  # all else waits for it
    resources:
        mem_mb=lambda wildcards, attempt: KNOWN.mem_mb(attempt, wildcards.model, wildcards.task),
        runtime=lambda wildcards, attempt: KNOWN.runtime(attempt),
    message:
        "encoding {wildcards.task} for {wildcards.model}"
    shell:
        "OMP_NUM_THREADS={threads} costbp prepare --plan {params.plan:q}"
        " --model {wildcards.model:q} --task {wildcards.task:q} --out {output:q} > {log:q} 2>&1"
