"""TextVQA: questions on text in photographs (Singh et al. 2019, arXiv 1904.08920)."""

from costbp.tasks.visual_questions import visual_task

TASK = visual_task()
