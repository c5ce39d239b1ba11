# Trains a toy cell on Fashion-MNIST as those of its table were: 200 epochs at a constant rate,
# no augmentation.
# python train_base.py config/base_toy_cell.py --arch=out/search_toy_cell_drnas/arch.json
out_dir = 'out/base_toy_cell'
dataset = 'fashion_mnist'
batch_size = 256
max_iters = 46875
eval_interval = 2340
val_portion = 0.0
weight_optimizer = 'sgd'
learning_rate = 0.01
decay_lr = False
warmup_iters = 0
weight_decay = 5e-4
grad_clip = 0.0
