"""What ``composer train.py -f FILE`` runs."""

import sys

from composer_sba.__main__ import main

raise SystemExit(main(['train', *sys.argv[1:]], prog='composer train.py'))
