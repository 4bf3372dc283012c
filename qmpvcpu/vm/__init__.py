"""Floor 5: one running VM. The shell around the engine: sends, reads, waits, records; decides nothing by itself.

``attach`` makes a ``VcpuController`` (``controller``), whose parts stand on each other: ``observed`` changes
nothing, ``onevcpu`` changes one vCPU, ``wholemaps`` many. Under them ``session`` holds the connection, its
``audience`` whoever waits for news, ``keeper`` the record, ``nextboot`` the next boot; ``commands`` are the two that
change a VM, ``turns`` says who may send them now, ``applying`` carries a transition out.
"""
