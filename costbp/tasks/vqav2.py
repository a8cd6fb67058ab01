"""VQAv2: open questions on photographs (Goyal et al. 2017, arXiv 1612.00837)."""

from costbp.tasks.visual_questions import visual_task

TASK = visual_task()
