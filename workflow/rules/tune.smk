# Learning rates: trials at the same total cost for every method, scored on the validation split. Not part
# of `all` where the choices are committed: `snakemake tune --cores all` makes them anew. A study with
# `tuning.first` runs its trials before it trains.


rule trials:
    input:
        RESULTS / "prepared" / "{model}" / "{task}.json",
    output:
        RESULTS / "trials" / "{model}" / "{task}" / "{method}" / "{budget}.json",
    params:
        plan=RESOLVED,
        runs=lambda wildcards: PLAN.trials_key(Cell(**wildcards)),
    log:
        LOGS / "trials" / "{model}" / "{task}" / "{method}" / "{budget}.log",
    benchmark:
        LOGS / "trials" / "{model}" / "{task}" / "{method}" / "{budget}.benchmark.jsonl"
    threads: 1
    resources:
        gpu=PLAN.study.resources.gpu,
        mem_mb=lambda wildcards, attempt: KNOWN.mem_mb(attempt, wildcards.model, wildcards.task),
        runtime=lambda wildcards, attempt: KNOWN.runtime(attempt, [Cell(**wildcards)], trials=True),
    message:
        "trials of {wildcards.method} for {wildcards.model} on {wildcards.task}"
    shell:
        "OMP_NUM_THREADS={threads} exec costbp trials --plan {params.plan:q} --model {wildcards.model:q}"
        " --task {wildcards.task:q} --method {wildcards.method:q} --budget {wildcards.budget:q}"
        " --out {output:q} > {log:q} 2>&1"


rule tune:
    input:
        again,
        [PLAN.trials_file(cell) for cell in CELLS],
    output:
        RESULTS / "tuned.yaml",
    params:
        plan=RESOLVED,
        committed=PLAN.study.tuning.file,
        folder=PLAN.study.tuning.file.parent,
    log:
        LOGS / "tune.log",
    localrule: True
    message:
        "choosing learning rates: {params.committed}"
    shell:
        "(costbp tune --plan {params.plan:q} --out {output:q}"
        " && mkdir -p -- {params.folder:q}"
        " && cp -- {output:q} {params.committed:q}) > {log:q} 2>&1"
