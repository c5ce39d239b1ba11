# The toy cell on 8 x 8 digits, on a laptop: no download, no GPU.
# python train_search.py config/search_toy_cell_digits.py config/drnas.py
include('shared/digits_search.py')
space = 'toy_cell'
out_dir = 'out/search_toy_cell_digits'
init_channels = 8
