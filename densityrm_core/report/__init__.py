"""Numbers to tables, figures and sections, and the verdict. Made of rows: it loads no model and knows of none.

Begin with `verdict.build_report`; a report is the blocks of `document`. Imports measurement and the ground.
"""
