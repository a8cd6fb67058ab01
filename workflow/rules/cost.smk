# Cost of one step of every method on a (model, task): traced without weights and without a GPU where
# the model's configuration is known, else counted on its own batches. One process does all methods,
# since importing takes longer; each method's figures are cached, so a new method adds only its own.


rule cost:
    input:
        RESULTS / "prepared" / "{model}" / "{task}.json",
        trials=lambda wildcards: PLAN.first_trials(**wildcards),
    output:
        RESULTS / "cost" / "{model}" / "{task}.json",
    params:
        plan=RESOLVED,
        methods=lambda wildcards: ",".join(PAIRS[wildcards.model, wildcards.task]),
        specs=lambda wildcards: PLAN.cost_keys(wildcards.model, wildcards.task),
    log:
        LOGS / "cost" / "{model}" / "{task}.log",
    benchmark:
        LOGS / "cost" / "{model}" / "{task}.benchmark.jsonl"
    threads: 1
    priority: 1
    resources:
        gpu=lambda wildcards: 0 if PLAN.is_traced(wildcards.model) else PLAN.study.resources.gpu,
        mem_mb=lambda wildcards, attempt: KNOWN.mem_mb(attempt),
        runtime=lambda wildcards, attempt: KNOWN.runtime(attempt),
    message:
        "counting the cost of {params.methods} for {wildcards.model} on {wildcards.task}"
    shell:
        "OMP_NUM_THREADS={threads} costbp cost --plan {params.plan:q} --model {wildcards.model:q}"
        " --task {wildcards.task:q} --method {params.methods:q} --out {output:q} > {log:q} 2>&1"
