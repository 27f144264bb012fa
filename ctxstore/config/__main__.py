"""`python -m ctxstore.config`: writes the configuration page to stdout, or the defaults file.

Owns nothing but the choice; `make docs` redirects its output.
"""

import sys

from ctxstore.config.documents import configuration_markdown, defaults_toml

sys.stdout.write(defaults_toml() if "--defaults" in sys.argv[1:] else configuration_markdown())
