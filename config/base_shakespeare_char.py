# Retrains what a search on Shakespeare's characters found, on one GPU.
# python train_base.py config/base_shakespeare_char.py --arch=out/search_shakespeare_char_drnas/arch.json
include('shared/shakespeare_char.py')
out_dir = 'out/base_shakespeare_char'
val_portion = 0.1
early_stopping = 8
