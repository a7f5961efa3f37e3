"""Draw a contact sheet of the embedded suite.

Examples:
  lit-merge data sheet --output sheet.png
  lit-merge data sheet --output sheet.png --tasks '[digits, signs]'
  lit-merge data sheet --output sheet.png --split train --rows 4
"""

from lit_merge.data.embedded.sheet import contact_sheet as sheet

__all__ = ["sheet"]
