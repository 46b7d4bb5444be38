"""The federation over Flower: SuperLink, SuperNodes, and what of ours runs beside them.

    certificates    a certificate authority, the server's certificate, the SuperNodes' keys
    new_folders     what `federation init` writes
    messages        requests and replies as Flower messages
    compatibility   which Flower, and whether it has what is used of it
    processes       programs that are kept running, and die with whoever started them
    superlink       the server's SuperLink, closed to strangers but for SuperNodes
    acceptor        takes the server's tasks; the ServerApp that runs is the one installed here
    server_task     one such task: the coordinator over a Flower grid
    grid_transport  how the coordinator reaches clients, whatever the mailbox
    mailbox         Flower's grid as a mailbox in which one sender cannot hold up another
    arriving        a message whose content comes in pieces
    supernode       a client's SuperNode
    bridge          takes the client's tasks and hands them to the worker
    client_app      the ClientApp: forwards to the worker
    control         registers nodes, starts runs and watches them
    services        `federation server`, `client` and `run`

Importing this package imports none of them, and none of Flower.
"""
