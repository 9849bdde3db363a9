"""The conformance suite: what every recurrence, component and task must fulfil, run on one of your own.

    deltalab certify my_card.yaml gate:my_gate --import my_gates
    pytest --pyargs deltalab.tests.conformance --card my_card.yaml --component gate:my_gate --import my_gates

Both run the same checks (`checks.CHECKS`, and of a task `TASK_CHECKS`), in float64 on the CPU. docs/COMPONENTS.md says what each
of them means.
"""
