"""What ``composer train.py -f FILE`` runs."""

from composer_sba.train import main

raise SystemExit(main())
