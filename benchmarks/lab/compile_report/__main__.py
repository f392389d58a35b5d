import sys

from benchmarks.lab.compile_report.report import main

sys.exit(main())
