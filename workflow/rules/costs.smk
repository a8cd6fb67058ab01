# Costs at full size, traced without weights. Not part of `all`: `snakemake costs --cores all`.

COSTS = PLAN.study.costs
TRACED = RESULTS / "costs"


rule cost_full_size:
    output:
        TRACED / "traces" / "{model}.json",
    params:
        plan=RESOLVED,
        methods=",".join(COSTS.methods) if COSTS else "",
        shape=f"--batch {COSTS.batch} --seq {COSTS.seq}" if COSTS else "",
        specs=lambda wildcards: PLAN.trace_key(wildcards.model, COSTS.methods),
    log:
        LOGS / "cost_full_size" / "{model}.log",
    benchmark:
        LOGS / "cost_full_size" / "{model}.benchmark.jsonl"
    threads: 1
    resources:
        mem_mb=lambda wildcards, attempt: KNOWN.mem_mb(attempt),
    message:
        "tracing {wildcards.model} at full size"
    shell:
        "OMP_NUM_THREADS={threads} costbp cost --plan {params.plan:q} --model {wildcards.model:q}"
        " --method {params.methods:q} {params.shape} --out {output:q} > {log:q} 2>&1"


rule sweep:
    output:
        TRACED / "sweeps" / "{sweep}.json",
    params:
        plan=RESOLVED,
        specs=lambda wildcards: PLAN.sweep_key(wildcards.sweep),
    log:
        LOGS / "sweep" / "{sweep}.log",
    benchmark:
        LOGS / "sweep" / "{sweep}.benchmark.jsonl"
    threads: 1
    resources:
        mem_mb=lambda wildcards, attempt: KNOWN.mem_mb(attempt),
    message:
        "sweep: {wildcards.sweep}"
    shell:
        "OMP_NUM_THREADS={threads} costbp sweep {wildcards.sweep:q} --plan {params.plan:q} --out {output:q} > {log:q} 2>&1"


rule fit:
    output:
        TRACED / "fits" / "{model}.json",
    params:
        plan=RESOLVED,
        methods=",".join(COSTS.fits.methods) if COSTS and COSTS.fits else "",
        cards=",".join(COSTS.fits.cards) if COSTS and COSTS.fits else "",
        shape=f"--batch {COSTS.batch} --seq {COSTS.seq}" if COSTS else "",
        specs=lambda wildcards: PLAN.trace_key(wildcards.model, COSTS.fits.methods),
    log:
        LOGS / "fit" / "{model}.log",
    benchmark:
        LOGS / "fit" / "{model}.benchmark.jsonl"
    threads: 1
    priority: 1
    resources:
        mem_mb=lambda wildcards, attempt: KNOWN.mem_mb(attempt),
    message:
        "what fits: {wildcards.model}"
    shell:
        "OMP_NUM_THREADS={threads} costbp fit --plan {params.plan:q} --model {wildcards.model:q}"
        " --method {params.methods:q} --memory {params.cards:q} {params.shape} --no-lengths"
        " --out {output:q} > {log:q} 2>&1"


rule costs:
    input:
        again,
        expand(TRACED / "traces" / "{model}.json", model=COSTS.models if COSTS else []),
        expand(TRACED / "sweeps" / "{sweep}.json", sweep=list(COSTS.sweeps) if COSTS else []),
        expand(
            TRACED / "fits" / "{model}.json",
            model=COSTS.fits.models if COSTS and COSTS.fits else [],
        ),
    output:
        report(REPORTS / "costs" / "index.html", caption="../report/costs.rst", category="Costs"),
    params:
        plan=RESOLVED,
        texts=TEXTS,
    log:
        LOGS / "costs.log",
    localrule: True
    message:
        "writing {output}"
    shell:
        "costbp costs --plan {params.plan:q} > {log:q} 2>&1"
