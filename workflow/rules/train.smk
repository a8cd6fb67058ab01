# One job an experiment; its seeds run one after the other in one process. What is finished lives in
# the run store, outside `output:`, so that a failed or killed job loses nothing.


rule tracking_store:
    output:
        RESULTS / "tracking.json",
    params:
        plan=RESOLVED,
    log:
        LOGS / "tracking_store.log",
    localrule: True
    message:
        "creating the MLflow experiment"
    shell:
        "costbp track --create --plan {params.plan} --out {output} > {log} 2>&1"


rule train:
    input:
        data=RESULTS / "prepared" / "{model}" / "{task}.json",
        store=ancient(RESULTS / "tracking.json"),
    output:
        RESULTS / "train" / "{model}" / "{task}" / "{method}" / "{budget}.json",
    params:
        plan=RESOLVED,
        runs=lambda wildcards: [spec.hash for spec in PLAN.specs(Cell(**wildcards))],
    log:
        LOGS / "train" / "{model}-{task}-{method}-{budget}.log",
    benchmark:
        LOGS / "train" / "{model}-{task}-{method}-{budget}.benchmark.jsonl"
    threads: 1
    resources:
        gpu=PLAN.study.resources.gpu,
        mem_mb=PLAN.study.resources.mem_mb,
        runtime=PLAN.study.resources.runtime,
    message:
        "training {wildcards.model} on {wildcards.task} by {wildcards.method}, {wildcards.budget}"
    shell:
        "OMP_NUM_THREADS={threads} costbp train --plan {params.plan} --model {wildcards.model}"
        " --task {wildcards.task} --method {wildcards.method} --budget {wildcards.budget}"
        " --out {output} > {log} 2>&1"
