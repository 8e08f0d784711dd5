"""Spares a process two seconds: import it before nbformat, or give it to pytest with ``-p``.

nbformat imports jsonschema, which imports every checker of formats that it finds.  One of them,
rfc3987_syntax (Jupyter's server brings it along), makes forty parsers of web addresses when it is
imported; nothing that is checked here holds an address in that form.  An entry of None makes the
import fail, and jsonschema goes on without.
"""

from __future__ import annotations

import sys

sys.modules.setdefault("rfc3987_syntax", None)
