"""From feeds to stores: the Rx graph, its operators, and the memory it keeps."""
