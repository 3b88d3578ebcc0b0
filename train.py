from composer_sba.train import main

raise SystemExit(main())
