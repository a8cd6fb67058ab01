# A job runs the experiments of one (model, task, budget): one of them, or as many as a study whose runs
# are short puts into one process. Seeds run one after the other. What is finished lives in the run
# store, outside `output:`, so that a failed or killed job loses nothing. `exec`: a scheduler's signal to
# end ends a shell at once, and its job with it, before the step is done and its checkpoint written.


rule train:
    input:
        RESULTS / "prepared" / "{model}" / "{task}.json",
        trials=lambda wildcards: PLAN.first_trials(**wildcards),
    output:
        RESULTS / "train" / "{model}" / "{task}" / "{budget}" / "{methods}.json",
    params:
        plan=RESOLVED,
        names=lambda wildcards: wildcards.methods.replace("+", ","),
        runs=lambda wildcards: PLAN.hashes(**wildcards),
        start_unfit=PLAN.study.start_unfit,
    log:
        LOGS / "train" / "{model}" / "{task}" / "{budget}" / "{methods}.log",
    benchmark:
        LOGS / "train" / "{model}" / "{task}" / "{budget}" / "{methods}.benchmark.jsonl"
    wildcard_constraints:
        model="|".join(map(re.escape, ENCODERS)) or "(?!)",
    threads: 1
    priority: 1  # the long jobs first, so that no core waits for one at the end
    resources:
        gpu=PLAN.study.resources.gpu,
        mem_mb=lambda wildcards, attempt: KNOWN.mem_mb(attempt, wildcards.model, wildcards.task),
        runtime=lambda wildcards, attempt: KNOWN.runtime(attempt, PLAN.cells_of(**wildcards)),
    message:
        "training {wildcards.model} on {wildcards.task} by {params.names}, {wildcards.budget}"
    shell:
        "OMP_NUM_THREADS={threads} exec costbp train --plan {params.plan:q} --model {wildcards.model:q}"
        " --task {wildcards.task:q} --method {params.names:q} --budget {wildcards.budget:q}"
        " --out {output:q} > {log:q} 2>&1"


use rule train as train_head with:
    wildcard_constraints:
        model="|".join(map(re.escape, HEADS)) or "(?!)",
    priority: 0
